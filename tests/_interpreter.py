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
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = _once_a_launch(
            interpreter._patch_lang, interpreter.GridExecutor.__call__
        )
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


def _once_a_launch(patch, launch):
    """The language is patched anew at each call of a device function; within a launch, once per module is enough."""
    patched = set()
    launches = []

    def counted(self, *arguments, **options):
        patched.clear()
        launches.append(self)
        try:
            return launch(self, *arguments, **options)
        finally:
            launches.pop()
            patched.clear()

    @functools.cache
    def modules_of(function):
        seen = function.__globals__.values()
        return tuple(module for module in (language, language.core) if any(value is module for value in seen))

    def patch_lang(function):
        modules = modules_of(function)
        if launches and modules in patched:
            return None  # only a launch asks for the scope, and when it does nothing is patched
        scope = patch(function)
        patched.add(modules)
        return scope

    return patch_lang, counted
