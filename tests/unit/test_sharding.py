"""Rules, and what they refuse."""

import jax
import pytest
from jax.sharding import PartitionSpec

from sam_jax.errors import ConfigError
from sam_jax.sharding import ShardingConfig, describe, make_mesh, tree_shardings


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float32")


TREE = {"encoder": {"kernel": shape(3, 16, 8), "bias": shape(8)}, "step": shape()}


def config(*rules, **changes):
    return ShardingConfig(data=2, fsdp=4, rules=rules, **changes)


def test_a_rule_is_aligned_at_the_last_dimension():
    rules = config((r"kernel$", ("fsdp", None)))
    shardings = tree_shardings(TREE, make_mesh(rules), rules)
    assert shardings["encoder"]["kernel"].spec == PartitionSpec(None, "fsdp", None)
    assert shardings["encoder"]["bias"].spec == PartitionSpec()
    assert describe(TREE, shardings) == [
        "encoder/bias  (8,)  [replicated]  8",
        "encoder/kernel  (3, 16, 8)  [-, fsdp, -]  96",
        "step  ()  [replicated]  1",
    ]


def test_the_first_rule_that_matches_counts():
    rules = config((r"encoder/kernel", (None, "fsdp")), (r"kernel|bias", ()))
    shardings = tree_shardings(TREE, make_mesh(rules), rules)
    assert shardings["encoder"]["kernel"].spec == PartitionSpec(None, None, "fsdp")


@pytest.mark.parametrize(
    ("sharding_config", "message"),
    [
        (config((r"kernal", ("fsdp",))), r"match nothing: \['kernal'\]"),
        (config((r"bias", ("fsdp", None))), r"rule for encoder/bias \(8,\) has 2 dimensions"),
        (config((r"kernel", ("fsdp", None, None))), "3 does not divide by the 4 devices"),
        (
            config((r"bias", ("fsdp",)), max_replicated_size=100),
            "encoder/kernel .* no sharding rule",
        ),
    ],
)
def test_what_is_refused(sharding_config, message):
    with pytest.raises(ConfigError, match=message):
        tree_shardings(TREE, make_mesh(sharding_config), sharding_config)


def test_a_large_copy_is_fine_if_a_rule_says_so():
    rules = config((r"kernel", ()), max_replicated_size=100)
    shardings = tree_shardings(TREE, make_mesh(rules), rules)
    assert shardings["encoder"]["kernel"].is_fully_replicated


def test_devices_must_add_up():
    with pytest.raises(ConfigError, match="do not multiply to the 8 devices"):
        make_mesh(ShardingConfig(data=3, fsdp=2))
    assert make_mesh(ShardingConfig(fsdp=2)).shape == {"data": 4, "fsdp": 2, "tensor": 1}
