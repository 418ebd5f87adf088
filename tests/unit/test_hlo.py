"""Reading compiled programs: loops by their trips, transfers by kind and size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sam_jax import hlo

# As the TPU compiler writes it, abridged.
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[128,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %g = bf16[128,128]{1,0} all-gather(%p), replica_groups=mesh['a'=16,'b'=2] {'a'}
}

%body (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[], f32[64]{0}) parameter(0)
  %x = f32[64]{0} get-tuple-element(%t), index=1
  %y = f32[64]{0} fusion(%x), kind=kLoop, calls=%whatever, backend_config={"estimated_cycles":"100"}
  %r = f32[64]{0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %o = (s32[], f32[64]{0}) tuple(%i, %r)
}

%condition (t: (s32[], f32[64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %async-collective-start = (bf16[8,128], bf16[128,128]) fusion(%a), kind=kCustom, calls=%fused
  %w = (s32[], f32[64]{0}) while(%init), condition=%condition, body=%body
  %k = f32[32]{0:S(1)} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"500","transcendentals":"7"}}}
  ROOT %z = f32[64]{0} fusion(%a), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"7"}
}
"""


def test_loops_count_as_often_as_they_run() -> None:
    instructions = list(hlo.instructions(TEXT))
    assert sum(i.cycles * i.trips for i in instructions) == 11 * 100 + 7
    (kernel,) = (i for i in instructions if i.is_kernel)
    assert kernel.kernel_flops == 500
    # Read from device memory, written to the fast one.
    assert kernel.moved_bytes == 64 * 4


def test_transfers_by_hand() -> None:
    gather, reduce = (
        hlo.Collective("all-gather", 128 * 128 * 2, 16, 1),
        hlo.Collective("all-reduce", 64 * 4, 4, 11),
    )
    assert hlo.collectives(TEXT) == [gather, reduce]
    # A ring: everything but one's own piece; a sum is scattered, then gathered.
    assert gather.sent_bytes == pytest.approx(128 * 128 * 2 * 15 / 16)
    assert reduce.sent_bytes == pytest.approx(11 * 256 * 2 * 3 / 4)


@pytest.mark.parametrize(
    ("line", "kind", "num_bytes", "group_size"),
    [
        # Results alone, as for GPUs.
        ("bf16[64]{0} all-reduce-start(%x), replica_groups=[2,4]<=[8], ", "all-reduce", 128, 4),
        ("(bf16[64]{0}, f32[8]{0}) all-reduce-start(%x, %y), ", "all-reduce", 160, None),
        ("(f32[], f32[]) all-reduce-start(%x, %y), ", "all-reduce", 8, None),
        # Operands before the results.
        ("(bf16[64]{0}, bf16[64]{0}) all-reduce-start(%x), ", "all-reduce", 128, None),
        (
            "((bf16[8]{0}, f32[4]{0}), (bf16[64]{0}, f32[32]{0})) all-gather-start(%x, %y), ",
            "all-gather",
            256,
            None,
        ),
        (
            "(f32[8,8]{1,0:T(8)}, f32[64,8]{1,0:T(8)}) all-gather-start(f32[8,8]{1,0:T(8)} %x), ",
            "all-gather",
            2048,
            None,
        ),
        ("((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%x), ", "reduce-scatter", 32, None),
        # Counters after them.
        (
            "(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), ",
            "collective-permute",
            16,
            None,
        ),
        # Groups in every form.
        (
            "f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, ",
            "all-reduce",
            16,
            8,
        ),
        (
            "f32[4] all-reduce(%x), replica_groups=mesh['a'=4], device_ids=([2,4]T(1,0)) {'a'}",
            "all-reduce",
            16,
            4,
        ),
        (
            "f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}, ",
            "all-reduce",
            16,
            2,
        ),
        (
            "f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=16] {'a','b':(2)4}, ",
            "all-reduce",
            16,
            8,
        ),
        ("f32[4] all-reduce(%x), replica_groups={}, ", "all-reduce", 16, None),
    ],
)
def test_transfers_as_compilers_write_them(
    line: str, kind: str, num_bytes: int, group_size: int | None
) -> None:
    text = f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  %t = {line}to_apply=%add\n}}\n"
    assert hlo.collectives(text) == [hlo.Collective(kind, num_bytes, group_size, 1)]


@pytest.mark.parametrize(
    "target", ["tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2"]
)
def test_kernels_of_ours_are_known_by_their_targets(target: str) -> None:
    text = f'ENTRY %m () -> f32[] {{\n  %k = f32[] custom-call(), custom_call_target="{target}"\n}}'
    (instruction,) = hlo.instructions(text)
    assert instruction.is_kernel


def test_bytes_of_types() -> None:
    assert hlo.bytes_of("(bf16[8,128]{1,0:T(8,128)(2,1)}, f32[], pred[3])") == 2048 + 4 + 3
    assert hlo.bytes_of("bf16[8,128]{1,0:S(1)}", in_device_memory=True) == 0


def test_a_real_program() -> None:
    """A product of split factors in a loop, as this machine's compiler writes it."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))

    def five_times(x, w):
        # Summed over what is split, in every turn.
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    jitted = jax.jit(five_times, in_shardings=(columns, rows), out_shardings=columns)
    shape = jax.ShapeDtypeStruct((16, 16), np.float32)
    found = hlo.collectives(jitted.lower(shape, shape).compile().as_text())
    assert {c.kind for c in found} & {"all-reduce", "reduce-scatter", "all-gather"}
    assert all(c.group_size == 8 for c in found)
    assert sum(c.count for c in found) >= 5


def test_groups_of_a_real_program_whose_devices_are_reordered() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("y",), ()))
    gathered = jax.jit(
        lambda x: jax.lax.with_sharding_constraint(x, whole), in_shardings=split
    ).lower(jax.ShapeDtypeStruct((16, 16), np.float32))
    (found,) = hlo.collectives(gathered.compile().as_text())
    assert found == hlo.Collective("all-gather", 16 * 16 * 4, 4, 1)
