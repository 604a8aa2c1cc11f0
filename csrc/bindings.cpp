// Registration only. Schemas: robattr_fast/ops/_schema.py.
#include "cpu/operators.h"
#ifdef ROBATTR_CUDA
#include "cuda/operators.h"
#endif

STABLE_TORCH_LIBRARY_IMPL(robattr_fast_C, CPU, m) {
  m.impl("betting_bounds", TORCH_BOX(&robattr_fast::betting_bounds));
  m.impl("linear_attention", TORCH_BOX(&robattr_fast::linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&robattr_fast::linear_attention_backward));
  m.impl("linear_attention_double_backward", TORCH_BOX(&robattr_fast::linear_attention_double_backward));
  m.impl("noisy_samples", TORCH_BOX(&robattr_fast::noisy_samples));
  m.impl("packed_gram", TORCH_BOX(&robattr_fast::packed_gram));
  m.impl("topk_threshold", TORCH_BOX(&robattr_fast::topk_threshold));
  m.impl("soft_topk", TORCH_BOX(&robattr_fast::soft_topk));
  m.impl("sparsify", TORCH_BOX(&robattr_fast::sparsify));
  m.impl("count_sparsified_", TORCH_BOX(&robattr_fast::count_sparsified_));
}

#ifdef ROBATTR_CUDA
STABLE_TORCH_LIBRARY_IMPL(robattr_fast_C, CUDA, m) {
  m.impl("topk_threshold", TORCH_BOX(&robattr_fast::cuda::topk_threshold));
  m.impl("count_sparsified_", TORCH_BOX(&robattr_fast::cuda::count_sparsified_));
}
#endif
