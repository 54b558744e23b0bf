# ruff: noqa: E501
"""Reading compiled programs: made-up text with known sums."""

import pytest

from segdiff_jax.roofline import hlo, traffic

PROGRAM = """HloModule m, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%condition (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %q = (s32[], f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%q), index=1
  %all-reduce.2 = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %splash_mha_fwd.1 = bf16[5,2304,64]{2,1,0} custom-call(%k0, %k1), custom_call_target="tpu_custom_call"
  %k0 = bf16[5,2304,64]{2,1,0} parameter(1)
  %k1 = bf16[5,576,64]{2,1,0} parameter(2)
  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%i, %all-reduce.2)
}

%all-reduce-scatter.5 (r: f32[16,128]) -> f32[4,128] {
  %r = f32[16,128]{1,0} parameter(0)
  %all-reduce.9 = f32[16,128]{1,0} all-reduce(%r), replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %ds = f32[4,128]{1,0} dynamic-slice(%all-reduce.9, %r), dynamic_slice_sizes={4,128}
}

ENTRY %main.1_spmd (arg: f32[8,128]) -> f32[8,128] {
  %arg = f32[8,128]{1,0} parameter(0)
  %w = (s32[], f32[8,128]{1,0}) while(%arg), condition=%condition, body=%body
  %gathered = bf16[64,128]{1,0} all-gather(%arg), replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  %across = bf16[10]{0} all-reduce(%arg), replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%sum
  %swap = (f32[100]{0}, f32[100]{0}, u32[], u32[]) collective-permute-start(%arg), source_target_pairs={{0,1},{1,0}}
  %got = f32[100]{0} collective-permute-done(%swap)
  %alone = f32[7]{0} all-reduce(%arg), replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  ROOT %scattered = f32[4,128]{1,0} fusion(%arg), kind=kCustom, calls=%all-reduce-scatter.5
}
"""


def _by_kind(slices):
    return {(c.kind, c.network): c for c in hlo.collectives(PROGRAM, 4, slices)}


def test_collectives_in_loops_fusions_and_every_notation_of_groups():
    found = _by_kind(1)
    looped = 5 * 8 * 128 * 4
    assert found["all-reduce", "ici"].count == 5 + 1
    assert found["all-reduce", "ici"].payload == looped + 20
    assert found["all-reduce", "ici"].moved == looped + 20  # two peers: 2 · (2 - 1) / 2
    assert found["all-gather", "ici"].moved == 64 * 128 * 2 / 2
    assert found["reduce-scatter", "ici"].payload == 16 * 128 * 4
    assert found["reduce-scatter", "ici"].moved == 16 * 128 * 4 * 3 / 4
    assert found["collective-permute", "ici"].moved == 400
    assert len(found) == 4  # the group of one exchanges nothing


def test_groups_that_span_slices_use_the_data_center_network():
    found = _by_kind(2)
    assert found["all-reduce", "dcn"].payload == 20
    assert found["all-reduce", "ici"].count == 5
    assert found["all-gather", "ici"].count == 1
    assert found["reduce-scatter", "dcn"].count == 1


def test_what_the_runtime_exchanges_between_slices_is_counted():
    sends = "".join(
        f"""  %send.{i} = (bf16[{size}]{{0}}, u32[]{{:S(2)}}, token[]) send(%x, %t), channel_id={i},
 frontend_attributes={{_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{k}"}}
""".replace(",\n", ", ")
        for i, (k, size) in enumerate([("ALL_GATHER", 10), ("ALL_REDUCE", 40), ("ALL_GATHER", 2)])
    )
    text = f"ENTRY %main (x: bf16[10]) -> bf16[10] {{\n{sends}}}\n"
    found = {c.kind: c for c in hlo.collectives(text, 8, 2)}
    assert {c.network for c in found.values()} == {"dcn"}
    gathered, reduced = found["all-gather"], found["all-reduce"]
    assert (gathered.count, gathered.payload, gathered.moved) == (2, 2 * 24, 24)
    assert (reduced.count, reduced.payload, reduced.moved) == (1, 80, 80)


def test_kernels_count_their_products_as_often_as_they_run():
    assert hlo.kernel_flops(PROGRAM) == 5 * 2 * 2 * 5 * 2304 * 64 * 576


@pytest.mark.parametrize(
    ("name", "results", "products"),
    [
        ("splash_mha_dq_no_residuals.3", "bf16[5,2304,64]", 3),
        ("splash_mha_dkv_no_residuals.3", "f32[768,64], f32[768,64], bf16[K], bf16[K]", 4),
        # dkv that makes dq too, without and with a sum of its own for it
        ("splash_mha_dkv_no_residuals.3", "f32[K], f32[K], bf16[1,Q], bf16[K], bf16[K]", 5),
        (
            "splash_mha_dkv_no_residuals.3",
            "f32[8,64], f32[K], f32[K], bf16[1,Q], bf16[K], bf16[K]",
            5,
        ),
    ],
)
def test_flops_of_the_kernels_that_make_gradients(name, results, products):
    shapes = results.replace("K", "5,576,64").replace("Q", "5,2304,64")
    text = f"""ENTRY %main (q: bf16[5,2304,64], k: bf16[5,576,64]) -> bf16[5,576,64] {{
  %q = bf16[5,2304,64]{{2,1,0}} parameter(0)
  %k = bf16[5,576,64]{{2,1,0}} parameter(1)
  %{name} = ({shapes}) custom-call(%q, %k), custom_call_target="tpu_custom_call"
}}
"""
    assert hlo.kernel_flops(text) == products * 2 * 5 * 2304 * 64 * 576


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.entry_name("HloModule m")


SCHEDULED = """HloModule m, is_scheduled=true

%inside (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  ROOT %twice = f32[100]{0} add(%a, %a)
}

ENTRY %main (p: f32[100]) -> f32[100] {
  %p = f32[100]{0:T(512)} parameter(0)
  %copied = (f32[100]{0:T(512)S(1)}, f32[100]{0:T(512)}, u32[]{:S(2)}) copy-start(%p)
  %near = f32[100]{0:T(512)S(1)} copy-done(%copied)
  %half = ((f32[100]{0:T(512)}), f32[50]{0:T(512)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:50]}
  %other = f32[50]{0:T(512)S(1)} slice-done(%half)
  %joined = f32[100]{0:T(512)S(1)} custom-call(%other, %other), custom_call_target="ConcatBitcast"
  %inner = f32[100]{0:T(512)S(1)} fusion(%near), kind=kLoop, calls=%inside
  %mixed = (f32[100]{0:T(512)S(1)}, f32[100]{0:T(512)}) fusion(%inner, %p), kind=kLoop, calls=%inside
  %far = f32[100]{0:T(512)} get-tuple-element(%mixed), index=1
  %sent = (f32[100]{0:T(512)}, f32[400]{0:T(512)}) all-gather-start(%far), replica_groups=[1,4]<=[4]
  %got = f32[400]{0:T(512)} all-gather-done(%sent)
  ROOT %out = f32[100]{0:T(512)} fusion(%inner), kind=kLoop, calls=%inside
}
"""


def test_hbm_traffic_leaves_out_what_stays_on_the_chip():
    copied, half, mixed, gathered, out = 400, 200, 400 + 400, 400 + 1600, 400
    assert traffic.hbm_bytes(SCHEDULED) == copied + half + mixed + gathered + out


def test_hbm_traffic_of_a_loop_is_that_of_all_its_rounds():
    short, longer = (
        traffic.hbm_bytes(PROGRAM.replace("constant(5)", f"constant({n})")) for n in (5, 6)
    )
    reduced, kernel = 2 * 8 * 128 * 4, (2 * 5 * 2304 * 64 + 5 * 576 * 64) * 2
    condition = 4 + 4 + 1
    assert longer - short == reduced + kernel + condition


HIDDEN = """HloModule m, is_scheduled=true

%async_collective_fusion.1 (a: f32[10], b: f32[40], x: f32[100]) -> (f32[100], f32[10], f32[40]) {
  %a = f32[10]{0} parameter(0)
  %b = f32[40]{0} parameter(1)
  %x = f32[100]{0} parameter(2)
  %gather.1 = f32[40]{0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{}}
  %work = f32[100]{0} add(%x, %x)
  ROOT %t = (f32[100]{0}, f32[10]{0}, f32[40]{0}) tuple(%work, %a, %gather.1)
}

%begin (a: f32[10]) -> (f32[10], f32[40]) {
  %a = f32[10]{0} parameter(0)
  %gather.0 = f32[40]{0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{}}
  ROOT %t = (f32[10]{0}, f32[40]{0}) tuple(%a, %gather.0)
}

ENTRY %main (p: f32[10], q: f32[100]) -> f32[100] {
  %p = f32[10]{0} parameter(0)
  %q = f32[100]{0} parameter(1)
  %async-collective-start = (f32[10]{0}, f32[40]{0}) fusion(%p), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %a0 = f32[10]{0} get-tuple-element(%async-collective-start), index=0
  %b0 = f32[40]{0} get-tuple-element(%async-collective-start), index=1
  %fusion.1 = (f32[100]{0}, f32[10]{0}, f32[40]{0}) fusion(%a0, %b0, %q), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion.1
  %b1 = f32[40]{0} get-tuple-element(%fusion.1), index=2
  %sum.1 = f32[2]{0:S(1)} all-reduce(%q), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum
  %sum.2 = f32[2]{0:S(1)} all-reduce(%q), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum
  %async-collective-done = f32[40]{0} fusion(%b1), kind=kCustom, output_to_operand_aliasing={{}: (0, {})}, calls=%end
  ROOT %work1 = f32[100]{0} get-tuple-element(%fusion.1), index=0
}
"""


def test_an_exchange_hidden_behind_fusions_is_one():
    gather, reduce = hlo.collectives(HIDDEN, 4)
    assert (gather.count, gather.payload) == (1, 160)
    assert reduce.count == 2  # of one channel too, but two exchanges
    sums = 2 * 100 * 4
    assert traffic.hbm_bytes(HIDDEN) == (10 + 40) * 4 + 2 * 100 * 4 + sums


def test_estimated_cycles_count_loops_out_and_leave_out_what_is_not_estimated():
    fusion = "{} = f32[8]{{0}} fusion(%arg), kind=kLoop, calls=%sum, backend_config={{{}}}"
    cycles = '"window_config":{{"estimated_cycles":"{}"}}'
    lines = [fusion.format(f"  %f.{i}", cycles.format(n)) for i, n in enumerate((7, 2**63 - 1))]
    text = PROGRAM.replace("  ROOT %t =", f"{lines[0]}\n  ROOT %t =")
    text = text.replace("  %gathered =", f"{lines[1]}\n{lines[0]}\n  %gathered =")
    assert hlo.estimated_cycles(text) == 5 * 7 + 7
    assert hlo.estimated_cycles(PROGRAM) is None
