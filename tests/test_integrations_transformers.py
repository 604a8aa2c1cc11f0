"""transformers models from configurations alone, on kernel attention: forward, double backward, padding, refusals."""

import pytest
import torch
from _attention_models import interpretation_regularized

import robattr_fast as rf
from robattr_fast.nn import attention_maps, kernelize

transformers = pytest.importorskip("transformers", reason="the integration with transformers needs transformers")

from robattr_fast.integrations.transformers import register  # noqa: E402

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _registered():
    register()


def vit(implementation="robattr_linear", **settings):
    torch.manual_seed(2)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SMALL, **settings)
    return transformers.ViTForImageClassification._from_config(config, attn_implementation=implementation).eval()


def bert(implementation="robattr_linear", **settings):
    torch.manual_seed(2)
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **SMALL, **settings)
    return transformers.BertModel._from_config(config, attn_implementation=implementation).eval()


def llama(implementation="robattr_linear", **settings):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=1, use_cache=False, **SMALL, **settings)
    return transformers.LlamaModel._from_config(config, attn_implementation=implementation).eval()


def test_the_interface_is_given_kernel_attention():
    """Against the same model with the weights written out, in place of its eager softmax."""
    model = vit()
    x = torch.rand(2, 1, 8, 8)
    seen = {}
    layer = model.vit.layers[0].attention
    handle = layer.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output[0]))
    model(x)
    handle.remove()
    hidden = seen["args"][0]
    q, k, v = (p(hidden).view(2, 5, 2, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    expected = layer.o_proj(out.transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [bert, llama])
def test_padding_is_respected(model):
    """Silently dropped it would be, were the name not in AttentionMaskInterface as well."""
    model = model()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0]])
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    padded = model(ids, attention_mask=keep).last_hidden_state
    alone = model(ids[1:, :4]).last_hidden_state
    torch.testing.assert_close(padded[1:, :4], alone, rtol=1e-4, atol=1e-5)
    changed = ids.clone()
    changed[1, 4:] = 13
    torch.testing.assert_close(model(changed, attention_mask=keep).last_hidden_state[:, :4], padded[:, :4])
    unmasked = model(changed).last_hidden_state
    if model.config.model_type == "bert":
        assert float((unmasked[1, :4] - padded[1, :4]).detach().abs().max()) > 1e-4


def test_a_decoder_stays_causal():
    model = llama()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    torch.testing.assert_close(model(ids).last_hidden_state[:, :4], model(ids[:, :4]).last_hidden_state)


@pytest.mark.parametrize("padded", [False, True])
def test_bert_differentiates_twice(padded):
    model = bert().double()
    embeddings = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[1, 1, 1, 0]]) if padded else None

    def f(embeddings):
        return model(inputs_embeds=embeddings, attention_mask=keep).last_hidden_state[0, 0, :3].tanh().sum()

    (gradient,) = torch.autograd.grad(f(embeddings), embeddings, create_graph=True)
    direction = torch.randn(1, 4, 16, dtype=torch.float64)
    (product,) = torch.autograd.grad((gradient * direction).sum(), embeddings)
    step = 1e-5

    def gradient_at(point):
        point = point.detach().requires_grad_()
        return torch.autograd.grad(f(point), point)[0]

    differences = (gradient_at(embeddings + step * direction) - gradient_at(embeddings - step * direction)) / (2 * step)
    torch.testing.assert_close(product, differences, rtol=1e-5, atol=1e-7)
    if padded:
        assert bool((product[0, 3] == 0).all()), "nothing flows to padding"


def parameter_gradients(model, x, labels, target_map):
    model.zero_grad()
    interpretation_regularized(model, x, labels, target_map).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_an_interpretation_regularization_step_is_that_of_the_reference():
    """Cross-entropy + l (1 - cos(target map, input gradient)) + m |input gradient|, every parameter, then a step."""
    model = vit(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).train()
    x, target_map = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 0])
    ours = parameter_gradients(model, x, labels, target_map)
    with rf.backends.use("reference"):
        reference = parameter_gradients(model, x, labels, target_map)
        exact = parameter_gradients(model.double(), x.double(), labels, target_map.double())
    model.float()
    for name, gradient in ours.items():
        assert bool(gradient.isfinite().all()), name
        # The bias of the keys moves all scores of a softmax alike; it matters here, and so does every other parameter.
        assert float(gradient.abs().max()) > 0, name
        scale = float(exact[name].abs().max())
        error = float((reference[name] - exact[name]).abs().max())
        assert float((gradient - exact[name]).abs().max()) <= 2 * error + 2**-20 * scale, name
    before = float(interpretation_regularized(model, x, labels, target_map).detach())
    parameter_gradients(model, x, labels, target_map)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert float(interpretation_regularized(model, x, labels, target_map).detach()) < before


def test_the_default_attention_cannot_train_that_way():
    model = vit("sdpa")
    with pytest.raises(RuntimeError, match="derivative"):
        interpretation_regularized(
            model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), torch.rand(2, 1, 8, 8)
        ).backward()


def test_names_of_other_kernels():
    assert register() == "robattr_linear"
    assert register(normalize=False) == "robattr_linear_mean"
    assert register(kernel="gaussian") == "robattr_gaussian"
    assert register("mine", kernel="relu") == "mine"
    x = torch.rand(1, 1, 8, 8)
    outputs = [vit(name)(x).logits for name in ("robattr_linear", "robattr_linear_mean", "robattr_gaussian", "mine")]
    assert all(float((a - b).detach().abs().max()) > 1e-6 for i, a in enumerate(outputs) for b in outputs[:i])
    with pytest.raises(ValueError, match="kernel: got 'cosine'"):
        register(kernel="cosine")


def test_what_kernel_attention_cannot_do_is_refused():
    ids = torch.tensor([[3, 4, 5, 6]])
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 1, 4, 4\); .* never forms the N x N weights"):
        bert()(ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"dropout: got 0.1; .*config.attention_probs_dropout_prob"):
        bert().train()(ids)
    with pytest.raises(ValueError, match="packed sequences"):
        llama()(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    cached = llama()
    past = cached(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: got 1 queries for 5 keys"):
        cached(ids[:, :1], past_key_values=past, use_cache=True)
    config = transformers.MistralConfig(vocab_size=20, num_key_value_heads=1, sliding_window=2, **SMALL)
    mistral = transformers.MistralModel._from_config(config, attn_implementation="robattr_linear").eval()
    with pytest.raises(ValueError, match="sliding window"):
        mistral(ids)


@pytest.mark.parametrize("make", [vit, bert])
def test_kernelize_sets_the_interface(make):
    model = make("sdpa")
    arguments = {"pixel_values": torch.rand(1, 1, 8, 8)} if make is vit else {"input_ids": torch.tensor([[3, 4, 5]])}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    wrapped = torch.nn.ModuleDict({"inner": model})
    (swapped,) = kernelize(wrapped)
    assert swapped == ("inner", type(model).__name__, "robattr_linear")
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    torch.testing.assert_close(model(**arguments)[0], make()(**arguments)[0], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [bert, llama])
def test_maps_are_those_of_the_eager_model(make, implementation):
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0]])
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = make("eager")(ids, attention_mask=keep, output_attentions=True).attentions
    model = make(implementation)
    maps = attention_maps(model, ids, attention_mask=keep)
    assert model.config._attn_implementation == implementation
    for got, weights in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(got, weights)


def test_maps_of_kernel_attention():
    model = bert()
    ids, keep = torch.tensor([[9, 10, 11, 12, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    maps = attention_maps(model, ids, attention_mask=keep)
    assert list(maps) == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    for weights in maps.values():
        assert weights.shape == (1, 2, 6, 6)
        assert bool((weights[..., 4:] == 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))
    assert model.config._attn_implementation == "robattr_linear"
    model.set_attn_implementation("flex_attention")
    with pytest.raises(rf.ModelError, match="'flex_attention', takes eager, sdpa"):
        attention_maps(model, ids)


def clip():
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2, **SMALL},
        vision_config={"image_size": 8, "patch_size": 4, "num_channels": 1, **SMALL},
        projection_dim=8,
    )
    torch.manual_seed(2)
    return transformers.CLIPModel(config).eval()


class Stubborn(transformers.BertModel):
    """Its attention is its own, as in models older than the interface."""

    @classmethod
    def _can_set_attn_implementation(cls):
        return False


def test_kernelize_changes_nothing_if_one_model_keeps_its_attention():
    stubborn = Stubborn._from_config(bert("eager").config, attn_implementation="eager")
    mixed = clip()
    mixed.vision_model.set_attn_implementation("eager")
    model = torch.nn.ModuleDict({"a": torch.nn.MultiheadAttention(8, 2), "b": mixed, "c": stubborn})
    model = torch.nn.ModuleDict({"inner": model})
    with pytest.raises(rf.ModelError, match="Stubborn does not use the attention interface"):
        kernelize(model)
    assert type(model["inner"]["a"]) is torch.nn.MultiheadAttention
    parts = (mixed, mixed.text_model, mixed.vision_model, stubborn)
    assert [part.config._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager", "eager"]
    assert [swapped.name for swapped in kernelize(model, skip=["inner.c"])] == ["inner.a", "inner.b"]


def test_models_of_several_parts():
    """CLIP: a causal text model beside a vision model, each with a configuration of its own."""
    model = clip()
    arguments = {"input_ids": torch.tensor([[3, 4, 5, 2]]), "pixel_values": torch.rand(1, 1, 8, 8)}
    softmax = attention_maps(model, **arguments)
    assert kernelize(model) == [("", "CLIPModel", "robattr_linear")]
    kernel = attention_maps(model, **arguments)
    assert list(kernel) == list(softmax)
    assert len(kernel) == 4
    for maps in (softmax, kernel):
        for name, weights in maps.items():
            assert bool((weights.triu(1) == 0).all()) == ("text" in name)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    model.vision_model.set_attn_implementation("sdpa")
    with pytest.raises(rf.ModelError, match="robattr_linear, sdpa, takes one"):
        attention_maps(model, **arguments)


def test_smoothgrad_explains_it():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).logits

    maps = rf.smoothgrad(Logits(vit()).eval(), torch.rand(2, 1, 8, 8), sigma=0.1, samples=4, batch_size=4)
    assert bool(maps.isfinite().all())
    assert float(maps.abs().max()) > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "robattr_linear"])
@pytest.mark.parametrize("make", [bert, llama])
def test_maps_leave_the_forward_alone_on_a_left_padded_batch(make, implementation):
    """The first rows of a causal model see no key but padding; what each implementation makes of that stays its own."""
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    keep = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model = make(implementation)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    arguments = {"attention_mask": keep, "use_cache": False}
    expected = model(ids, **arguments)[0]
    maps = attention_maps(model, ids, **arguments)
    if implementation == "eager":  # the same formula, not the same code
        torch.testing.assert_close(seen[1], expected)
    else:
        assert torch.equal(seen[1], expected)
    for name, weights in maps.items():
        seeing = weights[0, :, 2:]
        assert not seeing[..., :2].any(), name
        torch.testing.assert_close(seeing.sum(-1), torch.ones(seeing.shape[:2]), rtol=0, atol=1e-5, msg=name)
