"""XFormers' kernels: which one takes which case, judged without a GPU, and what they compute, where there is one."""

import importlib.util
import math
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mm.attention
from mm.attention import Causal, Full, Keys, Mask, Packed, Paged, Window, attend
from mm.decoder.paged import Table

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers isn't installed"),
    pytest.mark.filterwarnings("ignore"),  # drivers and compilers warn of what is no concern of these tests
]

LEFT = {"full": Full(), "causal": Causal(), "window": Window(2), "two-sided window": Window(1, 2)}


# ----------------------------------------------------------------------- chosen, on tensors that only claim to be there


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Tensors on CUDA without data, on a device whose capability a test may set."""
    assert mm.attention._ops() is not None
    device = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: device[0])
    mm.attention._has_split_k.cache_clear()
    with FakeTensorMode():
        yield device
    mm.attention._has_split_k.cache_clear()


def chosen(
    mask: Mask, dtype: torch.dtype, *, learn: bool = False, key: int = 32, value: int = 32, groups: int = 4
) -> list[str]:
    """Names of the kernels, forward and backward, that xFormers picks; none where PyTorch's attention runs."""
    from xformers.ops import fmha

    names: list[str] = []
    pick = fmha.dispatch._run_priority_list

    def spy(*args: object) -> object:
        names.append(pick(*args).NAME)
        return pick(*args)

    sizes = ((2, 40, 4, key), (2, 40, groups, key), (2, 40, groups, value))
    q, k, v = (torch.empty(size, device="cuda", dtype=dtype).requires_grad_(learn) for size in sizes)
    with patch.object(fmha.dispatch, "_run_priority_list", spy):
        out = mm.attention._attend_xformers(q, k, v, mask=mask, scale=None, dropout=0.0)
    assert out is None or out.shape == (2, 40, 4, value)
    return [] if out is None else [name.split("@")[0].removesuffix("-pt") for name in names]


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", LEFT)
def test_every_mask_has_its_kernel(name: str, learn: bool) -> None:
    """XFormers refused all of them before: it takes an extension that doesn't load for a lack of CUDA."""
    for value in (32, 24):
        assert chosen(LEFT[name], torch.bfloat16, learn=learn, value=value) == ["fa2F", "fa2B"][: 1 + learn]
    wanted = ["cutlassF", "cutlassB"][: 1 + learn]
    if "two-sided" in name or (name == "window" and learn):
        wanted = []  # no kernel knows a two-sided window in fp32, or any window's gradient
    assert chosen(LEFT[name], torch.float32, learn=learn) == wanted


@pytest.mark.usefixtures("capability")
def test_grouped_keys_are_read_in_place_but_for_training() -> None:
    assert chosen(Causal(), torch.bfloat16, groups=2) == ["fa2F"]
    assert chosen(Causal(), torch.bfloat16, groups=2, learn=True) == ["fa2F", "fa2B"]


def test_what_no_kernel_takes_is_left_to_pytorch(capability: list[tuple[int, int]]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        seen = torch.ones(2, 40, 40, dtype=torch.bool, device="cuda")
        assert not chosen(Table(seen), dtype)
        assert not chosen(Causal(), dtype, key=512, value=512)
    assert not chosen(Causal(), torch.float64)
    assert not chosen(Causal(), torch.bfloat16, key=12, value=12)
    capability[0] = (7, 5)
    assert not chosen(Causal(), torch.bfloat16)
    capability[0] = (12, 0)
    assert not chosen(Causal(), torch.float32)
    assert chosen(Causal(), torch.bfloat16) == ["fa2F"]


@pytest.mark.parametrize(("queries", "heads"), [(1, 2), (4, 2), (1, 6)])
def test_the_paged_kernel_has_no_objection(capability: list[tuple[int, int]], queries: int, heads: int) -> None:
    from xformers.ops.fmha import triton_splitk
    from xformers.ops.fmha.common import Inputs

    pages = pages_of(64)
    q = torch.empty(1, 3 * queries, 2, heads // 2, 32, device="cuda", dtype=torch.bfloat16)
    k = torch.empty(1, 6 * 64, 2, 1, 32, device="cuda", dtype=torch.bfloat16).expand(-1, -1, -1, heads // 2, -1)
    bias = real_bias(pages, queries)
    assert triton_splitk.FwOp.not_supported_reasons(Inputs(q, k, k, attn_bias=bias)) == []
    capability[0] = (7, 5)
    assert not mm.attention._has_split_k(torch.device("cuda", 0))


def pages_of(size: int, device: str = "cpu") -> Paged:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        tables, lengths = torch.tensor([[4, 0], [2, 5], [1, 3]]), torch.tensor([100, 30, 128])
        return Paged(tables.to(device), lengths.to(device), page_size=size)


def real_bias(pages: Paged, queries: int) -> object:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return pages.bias(queries, 0)


def test_a_bias_is_made_once_for_all_layers() -> None:
    pages, packed = pages_of(64), Packed((3, 4), causal=True)
    assert pages.bias(1, 0) is pages.bias(1, 0)
    assert pages.bias(1, 0) is not pages.bias(2, 0)
    assert packed.bias(7, 7) is packed.bias(7, 7)
    assert packed == Packed((3, 4), causal=True)
    assert pages.counts == (100, 30, 128)


# --------------------------------------------------------------------------------------------- computed, on a real GPU


def near(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-3, "rtol": 1e-3}


def masks(q_len: int, k_len: int) -> list[Mask]:
    valid = torch.arange(k_len) < torch.tensor([k_len, 0, max(k_len - 2, 1)])[:, None]
    every: list[Mask] = [*LEFT.values(), Window(0), Keys(valid.cuda()), Keys(valid.flip(1)), Keys(valid, causal=True)]
    every += [Packed((q_len - 2, 0, 2), (k_len - 2, 0, 2))]
    return [*every, Packed((q_len - 1, 1), (k_len - 1, 1), causal=True)] if k_len >= q_len else every


def drawn(mask: Mask, q_len: int, k_len: int, *, dtype: torch.dtype, heads: int, groups: int, key: int, value: int):
    torch.manual_seed(0)
    batch = 1 if isinstance(mask, Packed) else 3
    sizes = ((batch, q_len, heads, key), (batch, k_len, groups, key), (batch, k_len, groups, value))
    return [torch.randn(size, device="cuda", dtype=dtype) for size in sizes]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """PyTorch's attention in fp32."""
    return mm.attention._attend_dense(q.float(), k.float(), v.float(), mask=mask, scale=None, dropout=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_len", "k_len"), [(64, 64), (3, 70), (70, 5)])
@pytest.mark.parametrize(
    "widths",
    [(4, 4, 32, 32), (6, 2, 48, 32), (4, 4, 192, 128), (4, 1, 16, 16)],
    ids=["heads", "grouped, narrow values", "latent attention's", "one key head"],
)
def test_attend_equals_sdpa_in_fp32_forward_and_backward(dtype, q_len, k_len, widths) -> None:
    heads, groups, key, value = widths
    for mask in masks(q_len, k_len):
        about = {"dtype": dtype, "heads": heads, "groups": groups, "key": key, "value": value}
        inputs = drawn(mask, q_len, k_len, **about)
        with torch.no_grad():
            got, expected = attend(*inputs, mask=mask).float(), exact(*inputs, mask)
        torch.testing.assert_close(got, expected, **near(dtype), msg=lambda m, at=mask: f"{at}: {m}")
        results = []
        for run in (exact, lambda *args: attend(*args[:3], mask=args[3])):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = run(*leaves, mask)
            (out.float() * torch.linspace(-1, 1, value, device="cuda")).sum().backward()
            results.append([out.float(), *(x.grad.float() for x in leaves)])
        for expected, got in zip(*results, strict=True):
            allowed = (3e-2 if dtype == torch.bfloat16 else 1e-3) * expected.norm() + 1e-3
            assert (got - expected).norm() <= allowed, f"{mask}, backward"


@pytest.mark.gpu
@pytest.mark.parametrize(("q_len", "heads", "width"), [(1, 2, 32), (4, 2, 64), (1, 6, 128), (4, 6, 16), (16, 2, 256)])
def test_the_paged_kernel_equals_sdpa_in_fp32(q_len: int, heads: int, width: int) -> None:
    mask = pages_of(64, "cuda")
    torch.manual_seed(0)
    q = torch.randn(3, q_len, heads, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 6 * 64, 2, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        got = mm.attention._attend_paged(q, k, v, mask=mask, scale=None)
        assert got is not None, "this case is one that the paged kernel takes"
        torch.testing.assert_close(got.float(), exact(q, k, v, mask), **near(torch.bfloat16))
        assert torch.equal(attend(q, k, v, mask=mask), got)


@pytest.mark.gpu
@pytest.mark.parametrize(("q_len", "width", "page"), [(17, 32, 64), (1, 48, 64), (1, 32, 32)])
def test_pages_that_the_kernel_refuses_are_read_by_sdpa(q_len: int, width: int, page: int) -> None:
    tables, lengths = torch.tensor([[4, 0], [2, 5], [1, 3]]).cuda(), torch.tensor([page + 1, 30, 2 * page]).cuda()
    mask = Paged(tables, lengths, page_size=page)
    q = torch.randn(3, q_len, 2, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 6 * page, 2, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.testing.assert_close(attend(q, k, v, mask=mask).float(), exact(q, k, v, mask), **near(torch.bfloat16))


@pytest.mark.gpu
def test_dropout_on_a_kernel_keeps_the_mean() -> None:
    q, k = (torch.randn(1, 64, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.ones_like(k)
    out = torch.stack([attend(q, k, v, mask=Causal(), dropout=0.3)[:, 32:] for _ in range(50)]).float()
    assert math.isclose(float(out.mean()), 1.0, abs_tol=0.05)
