"""What a machine can do, as data: sizes that fit, names, and plans that know it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import cpflex
from cpflex.topology import DEVICES, TOPOLOGIES

H100 = cpflex.Topology.named("h100-ib")


def test_ranks_lie_on_nodes_in_order():
    topology = dataclasses.replace(H100, gpus_per_node=4)
    assert [topology.node_of(rank) for rank in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [topology.num_nodes(ranks) for ranks in (1, 4, 5, 10)] == [1, 1, 2, 3]


def test_gpus_share_the_nics_of_their_node():
    assert H100.nic_gb_per_s == H100.inter_gb_per_s
    assert dataclasses.replace(H100, nics_per_node=4).nic_gb_per_s == H100.inter_gb_per_s / 2


def test_heads_count_bytes_and_operations():
    heads = cpflex.Heads(query=8, kv=2, dim=64, value_dim=32, element_bytes=4)
    assert (heads.row_bytes, heads.grad_row_bytes, heads.flops_per_pair) == (2 * 96 * 4, 2 * 96 * 4, 2 * 8 * 96)
    assert cpflex.Heads().row_bytes == 8 * 2 * 128 * 2


@pytest.mark.parametrize("named", [cpflex.Topology, cpflex.Device])
def test_a_name_that_is_not_known_lists_those_that_are(named):
    known = TOPOLOGIES if named is cpflex.Topology else DEVICES
    assert all(named.named(name) == value for name, value in known.items())
    with pytest.raises(ValueError, match=f"no 'dgx'; there are {', '.join(known)}"):
        named.named("dgx")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cpflex.Topology(0, 1.0, 1.0), "gpus_per_node must be an integer of at least 1; got 0"),
        (lambda: cpflex.Topology(8, 0.0, 1.0), "intra_gb_per_s must be a positive number; got 0.0"),
        (lambda: cpflex.Topology(8, 1.0, 1.0, oversubscription=0.5), "oversubscription must be at least 1"),
        (lambda: cpflex.Topology(8, 1.0, float("nan")), "inter_gb_per_s must be a positive number"),
        (lambda: cpflex.Device(tflops=-1), "tflops must be a positive number"),
        (lambda: cpflex.Heads(query=6, kv=4), "query heads must be a multiple of kv heads; got 6 and 4"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_plan_knows_its_machine_and_ranks_must_agree_on_it():
    def plan(**machine):
        return cpflex.make_plan(cpflex.causal(), 300, rank=1, world_size=4, ulysses_size=1, **machine)

    known = plan(topology=H100, heads=cpflex.Heads(query=16))
    assert known.fingerprint != plan(topology=H100).fingerprint != plan().fingerprint
    again = cpflex.Plan.from_bytes(known.to_bytes())
    assert again.fingerprint == known.fingerprint
    (kind,) = again.kinds.values()
    assert kind.machine == (H100, cpflex.Device(), cpflex.Heads(query=16))


def test_a_machine_is_given_whole_and_of_its_kind():
    for argument in ({"device": cpflex.Device()}, {"heads": cpflex.Heads()}):
        with pytest.raises(ValueError, match="pass topology="):
            cpflex.make_plan(cpflex.causal(), 64, **argument)
    with pytest.raises(TypeError, match=r"topology must be a cpflex.Topology; got str"):
        cpflex.make_plan(cpflex.causal(), 64, topology="h100-ib")


@pytest.mark.parametrize("value", [dataclasses.replace(H100, nics_per_node=4), cpflex.Device(tflops=312.5)])
def test_what_is_saved_is_read_again(value, tmp_path: Path):
    path = tmp_path / "machine.json"
    value.save(path, notes={"gpu": "H100", "torch": "2.13"})
    assert repr(type(value).load(path)) == repr(value)  # plans compare words: 47 is not 47.0
    assert json.loads(path.read_text())["notes"] == {"gpu": "H100", "torch": "2.13"}


def test_what_a_file_leaves_out_has_its_default(tmp_path: Path):
    (tmp_path / "one.json").write_text(
        '{"cpflex": "Topology", "format": 1, "gpus_per_node": 4, "intra_gb_per_s": 1.0, "inter_gb_per_s": 2.0}'
    )
    assert cpflex.Topology.load(tmp_path / "one.json") == cpflex.Topology(4, 1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "must hold JSON, as Topology.save writes it"),
        ("[]", "must hold a Topology"),
        ('{"cpflex": "Device", "format": 1}', "must hold a Topology"),
        ('{"cpflex": "Topology", "format": 2}', "is of format 2; this version reads format 1"),
        (
            '{"cpflex": "Topology", "format": 1, "nics": 4, "gpus": 8}',
            "a Topology has not: gpus, nics; it has gpus_per",
        ),
        ('{"cpflex": "Topology", "format": 1, "gpus_per_node": 8}', "its intra_gb_per_s, inter_gb_per_s"),
        (
            '{"cpflex": "Topology", "format": 1, "gpus_per_node": 8, "intra_gb_per_s": "fast", "inter_gb_per_s": 1}',
            "intra_gb_per_s must be a positive number; got 'fast'",
        ),
    ],
)
def test_a_file_that_holds_something_else_is_refused(text: str, said: str, tmp_path: Path):
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        cpflex.Topology.load(tmp_path / "machine.json")
