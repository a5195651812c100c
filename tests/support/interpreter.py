"""Makes triton's interpreter patch the language once a launch, and not again at every call of a function in a kernel.

That is half of its time. A launch has patched `triton.language` already; `triton.language.core`, which functions of
triton's own use, stays patched after the first of them.
"""

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """From now on, in this process."""
    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__globals__
        if tl.core in module.values() and id(module) not in patched:
            patched.add(id(module))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
