"""Registration of the operations with torch.

Each operation defines a forward and a backward op in the namespace `rigfuse` and wraps them in an `autograd.Function`
outside the op: the cheapest boundary that passes opcheck and full-graph compilation. The implementations import triton
in their bodies, so importing rigfuse does not.
"""

import torch

_LIBRARY = torch.library.Library("rigfuse", "DEF")


def register(schema: str, implementation, fake):
    """Defines `rigfuse::<schema>` for every device and returns its handle."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rigfuse::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.rigfuse, name).default
