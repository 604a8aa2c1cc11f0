"""Triton's interpreter without what it does over and over for nothing: the same results, several times faster."""

import functools

from triton import language
from triton.runtime import interpreter


def hasten() -> None:
    """Where this Triton's interpreter is another, it stays as it is: slow."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # then sums that overflow are looked for, and the finding is dropped
        builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _looked_up(interpreter._get_np_dtype)


def _looked_up(find):
    """The numpy type of a scalar type, for which a table is made anew each time."""
    known = {}

    def find_once(dtype):
        if type(dtype) is not language.dtype:
            return find(dtype)
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    return find_once


def _once_a_launch(patch):
    """The language is patched anew at each call of a device function; within a launch, once per module is enough."""
    patched = set()

    @functools.cache
    def modules_of(function):
        seen = function.__globals__.values()
        return tuple(module for module in (language, language.core) if any(value is module for value in seen))

    def patch_lang(function):
        modules = modules_of(function)
        if modules in patched:
            return None  # only a launch asks for the scope, and when it does nothing is patched
        patched.add(modules)
        scope = patch(function)
        restore = scope.restore

        def and_forget():
            patched.clear()
            restore()

        scope.restore = and_forget
        return scope

    return patch_lang
