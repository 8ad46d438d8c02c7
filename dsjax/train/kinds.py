"""What kind of work an operation of a training step is, by its names.

A kernel's or instruction's own name decides. What is a matmul by its name is told apart by the
scope it was traced in (`jax.named_scope`), where that is known: XLA keeps it in the operation's
`op_name`, such as "jit(step)/transpose(jvp(mtp))/router/td,de->te/dot_general".
"""

from __future__ import annotations

import re

ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
EXPERTS = "experts, grouped matmul"
HEAD, DENSE = "head, matmul", "dense matmul"
MATMUL = "matmul, not told apart"
QUANTISATION = "quantisation"
ORDER = "sort, gather, scatter"
REDUCTION = "reductions"
COPY = "copies and slices"
ELEMENTWISE = "other elementwise fusions"
COLLECTIVE, BESIDE = "between devices", "between devices, beside a matmul"
CONTROL = "loops and calls"
OTHER = "other"
KINDS = (
    ATTENTION_FORWARD, ATTENTION_BACKWARD, EXPERTS, HEAD, DENSE, MATMUL, QUANTISATION, ORDER,
    REDUCTION, COPY, ELEMENTWISE, COLLECTIVE, BESIDE, CONTROL, OTHER,
)  # fmt: skip

_PATTERNS = (
    (BESIDE, r"_beside_"),
    (COLLECTIVE, r"dispatch_(rows|quantized)|combine_(push|ranks)|expert_layout"),
    (ATTENTION_BACKWARD, r"mla_backward|bprop|(flash|fmha|sdpa)\w*bwd"),
    (ATTENTION_FORWARD, r"mla_forward|fprop|(flash|fmha|sdpa)\w*fwd"),
    (HEAD, r"gemm_softmax|cross_entropy"),
    (QUANTISATION, r"(?<!gather_|spread_)quanti[sz]e"),
    (EXPERTS, r"grouped|ragged"),
    (MATMUL, r"gemm|gemv|nvjet|xmma|cutlass|cublas|matmul|splitk|(^|[^a-z])dot([^a-z]|$)"),
    (COLLECTIVE, r"nccl|all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter|all[-_]?to[-_]?all"
                 r"|collective"),
    (ORDER, r"sort|gather|scatter|spread|cub::|radix|top_?k|permute|combine_rows"),
    (REDUCTION, r"reduce|softmax|argm(ax|in)|norm"),
    (COPY, r"memcpy|memset"),
    (ELEMENTWISE, r"swiglu"),
)  # fmt: skip
"""The first that is found in a name counts; what follows is by the name's words."""
_MOVES = {
    "copy", "transpose", "slice", "dynamic", "update", "concatenate", "pad", "bitcast", "broadcast",
    "iota", "reshape", "reverse", "squeeze", "in", "dim",
}  # fmt: skip
_FUSED = {"loop", "input", "wrapped", "ynn", "fusion"}
_CONTROL = {"while", "call", "conditional"}
_TRANSFORMS = re.compile(r"^(?:(?:jvp|transpose|vmap|pmap)\()+|\)+$")
_NO_SCOPES = {
    "while", "body", "cond", "scan", "eval_jaxpr", "closed_call", "checkpoint", "shard_map",
    "rematted_computation", "custom_vjp_call", "custom_jvp_call",
}  # fmt: skip


def kind_of(name: str, op_name: str = "") -> str:
    """One of KINDS; MATMUL for a matmul whose op_name, if there is one, tells no scope."""
    primitive = op_name.rsplit("/", 1)[-1]  # what "fusion.7" and such are told by
    kind = _by_name(name.lower()) or _by_name(primitive.lower())
    if kind == MATMUL and "/" in op_name:
        return _matmul_in(op_name)
    return kind or (ELEMENTWISE if "fusion" in name else OTHER)


def _by_name(name: str) -> str | None:
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name):
            return kind
    words = set(re.findall("[a-z]+", name))
    says = words - _FUSED
    if not says:
        return None
    if says <= _MOVES:
        return COPY
    if words & _FUSED:
        return ELEMENTWISE
    return CONTROL if says <= _CONTROL else None


def _matmul_in(op_name: str) -> str:
    """What this matmul is for; "dp" is how einsums write the head."""
    words = set(re.findall(r"\w+", op_name))
    if "mla_attention" in words:
        return ATTENTION_BACKWARD if is_backward(op_name) else ATTENTION_FORWARD
    if "routed_experts" in words:
        return EXPERTS
    return HEAD if words & {"head", "dp"} else DENSE


def is_backward(op_name: str) -> bool:
    """Whether an operation belongs to a backward pass; one that is computed again does not."""
    return "transpose(" in op_name


def scope_of(op_name: str) -> str:
    """The named scopes around an operation: "mtp/router, backward" of the one above."""
    parts = [_TRANSFORMS.sub("", part) for part in op_name.split(";")[0].split("/")[:-1]]
    scopes = [part for part in parts if re.fullmatch(r"[A-Za-z_]\w*", part)]
    path = "/".join(scope for scope in scopes if scope not in _NO_SCOPES)
    return ", ".join(filter(None, (path, "backward" if is_backward(op_name) else "")))


def is_fp8(name: str) -> bool:
    """Whether a matmul's name says that its operands are FP8."""
    return "fp8" in name.lower() or "e4m3" in name.lower()
