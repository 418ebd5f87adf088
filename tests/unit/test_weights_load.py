"""Any checkpoint becomes the model it is of, and is described; each form leads back to the same."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sam_jax.checkpoint import CheckpointError
from sam_jax.model_config import build_model, model_config_of
from sam_jax.models.sam import Sam, SamConfig, init_variables, variable_shapes
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.models.variants import VARIANTS
from sam_jax.weights import files, geometry
from sam_jax.weights import load as checkpoints
from sam_jax.weights.files import WeightsError, write_safetensors
from sam_jax.weights.load import describe, load, open_weights, save
from sam_jax.weights.names import NamesError, from_native
from tests.golden.tiny import TINY, random_variables

SQUARE = dataclasses.replace(
    TINY, image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(48, 48))
)


def shapes(config: SamConfig):
    return variable_shapes(config)


def weightless(config: SamConfig, scheme="official"):
    """Tensors of the right shapes and without memory of their own."""
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), shapes(config))
    return from_native(zeros, scheme)


def encode(model: Sam, variables, images):
    return jax.jit(functools.partial(model.apply, method=Sam.encode))(variables, images)


def assert_same_variables(found, expected) -> None:
    found, expected = (flatten_dict(tree, sep="/") for tree in (found, expected))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.fixture(scope="module")
def variables():
    return random_variables(SQUARE)


@pytest.mark.parametrize("scheme", ["official", "hugging_face"])
@pytest.mark.parametrize("config", [*VARIANTS.values(), TINY], ids=[*VARIANTS, "tiny"])
def test_the_shape_follows_from_the_tensors(config: SamConfig, scheme) -> None:
    if scheme == "hugging_face" and isinstance(config.image_encoder, TinyViTConfig):
        with pytest.raises(NamesError, match=r"stage_0_block_0.*hugging_face none"):
            weightless(config, scheme)
        return
    found_scheme, tensors = geometry.detect_scheme(weightless(config, scheme), "x")
    assert found_scheme == scheme
    hints = geometry.Hints(config.mask_decoder.num_heads)
    found = geometry.infer_config(tensors, scheme, "x", hints)
    # Sequences may be lists in one and tuples in the other.
    assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_recognised_at_any_size(name: str) -> None:
    config = VARIANTS[name]
    assert geometry.variant_name(config) == name
    larger = dataclasses.replace(config.image_encoder, image_size=(320, 640))
    assert geometry.variant_name(dataclasses.replace(config, image_encoder=larger)) == name
    is_tiny_vit = isinstance(config.image_encoder, TinyViTConfig)
    changes = {"depths": (2, 2, 6, 99)} if is_tiny_vit else {"depth": 99}
    deeper = dataclasses.replace(config.image_encoder, **changes)
    assert geometry.variant_name(dataclasses.replace(config, image_encoder=deeper)) == "custom"


@pytest.mark.parametrize("config", [*VARIANTS.values(), TINY], ids=[*VARIANTS, "tiny"])
def test_a_config_of_a_shape_builds_that_shape(config: SamConfig) -> None:
    through_json = json.loads(json.dumps(dataclasses.asdict(model_config_of(config))))
    from sam_jax.configuration import from_mapping
    from sam_jax.model_config import ModelConfig

    again = build_model(from_mapping(ModelConfig, through_json, "model")).config
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


@pytest.mark.parametrize("prefix", ["module.", "model.", "sam_model."])
def test_a_prefix_of_a_wrapper_is_taken_off(prefix: str) -> None:
    tensors = weightless(TINY)
    scheme, stripped = geometry.detect_scheme({prefix + k: v for k, v in tensors.items()}, "x")
    assert scheme == "official"
    assert stripped.keys() == tensors.keys()


def test_another_model_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"x holds no checkpoint of Segment Anything.*conv1"):
        geometry.detect_scheme({"conv1.weight": np.zeros(3)}, "x")
    # A vision transformer for classification has patches, too.
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        geometry.detect_scheme({"patch_embed.proj.weight": np.zeros(3)}, "x")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("orbax", "x"),
        ("hugging-face", "x"),
        ("official", "x.pth"),
        ("official", "x.safetensors"),
    ],
)
def test_every_form_leads_back_to_the_same(tmp_path: Path, variables, target, name) -> None:
    path = tmp_path / name
    if path.suffix == ".pth":
        pytest.importorskip("torch", reason="needs requirements-torch.lock")
    save(path, SQUARE, variables, target)
    assert list(tmp_path.iterdir()) == [path]
    weights = open_weights(path, decoder_heads=SQUARE.mask_decoder.num_heads)
    assert weights.config == SQUARE
    assert_same_variables(checkpoints.native_variables(weights), variables)
    assert not describe(path, decoder_heads=SQUARE.mask_decoder.num_heads).problems


def test_load_gives_a_model_that_runs(tmp_path: Path, variables) -> None:
    save(tmp_path / "x", SQUARE, variables, "hugging-face")
    model, loaded = load(tmp_path / "x")
    # The decoder's heads are the one number that no tensor tells: the config beside it does.
    assert model.config == SQUARE
    images = jax.numpy.ones((1, 48, 48, 3))
    np.testing.assert_array_equal(
        encode(model, loaded, images),
        encode(Sam(SQUARE), variables, images),
    )


def test_half_precision_is_read_as_float32(tmp_path: Path, variables) -> None:
    half = {k: v.astype(np.float16) for k, v in from_native(variables).items()}
    write_safetensors(tmp_path / "x.safetensors", half)
    _, loaded = load(tmp_path / "x.safetensors", decoder_heads=4)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16).astype(np.float32), variables)
    assert_same_variables(loaded, rounded)


def test_one_error_lists_what_is_wrong_by_both_names(tmp_path: Path, variables) -> None:
    tensors = from_native(variables)
    del tensors["mask_decoder.iou_token.weight"]
    tensors["image_encoder.neck.1.bias"] = np.zeros(5, np.float32)
    tensors["adapter.weight"] = np.zeros(5, np.float32)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors)
    with pytest.raises(NamesError, match="3 problems") as error:
        load(path, decoder_heads=4)
    message = str(error.value)
    assert message.startswith(f"{path} (custom): ")
    assert "missing: mask_decoder.iou_token.weight (native params/mask_decoder/output" in message
    assert "misshapen: image_encoder.neck.1.bias (5,) (native params/image_encoder/neck" in message
    assert "unexpected: adapter.weight (native none)" in message
    assert describe(path, decoder_heads=4).problems == message


def test_heads_are_never_guessed_at_another_width(tmp_path: Path, variables) -> None:
    write_safetensors(tmp_path / "x.safetensors", from_native(variables))
    with pytest.raises(WeightsError, match=r"does not tell how many heads.*--decoder-heads"):
        load(tmp_path / "x.safetensors")


def test_a_model_for_another_size_takes_the_weights(tmp_path: Path, variables) -> None:
    save(tmp_path / "run", SQUARE, variables, "orbax")
    fitted = jax.device_put(checkpoints.variables_for(Sam(TINY), tmp_path / "run"))
    assert fitted["params"]["image_encoder"]["pos_embed"].shape == (10, 12, 24)
    images = jax.numpy.ones((1, *TINY.image_encoder.image_size, 3))
    np.testing.assert_allclose(
        encode(Sam(TINY), fitted, images),
        # The model itself interpolates for images of another size.
        encode(Sam(SQUARE), variables, images),
        atol=1e-5,
    )


def test_a_runs_average_is_taken_unless_it_is_not_wanted(tmp_path: Path, variables) -> None:
    run, averaged = tmp_path / "run", jax.tree.map(lambda x: x + 1, variables)
    save(run, SQUARE, variables, "orbax")
    save(tmp_path / "other", SQUARE, averaged, "orbax")
    of_step = (tmp_path / "other" / "checkpoints" / "0", run / "checkpoints" / "0")
    shutil.copytree(of_step[0] / "model", of_step[1] / "ema")
    model = Sam(SQUARE)
    for found in (load(run).variables, checkpoints.variables_for(model, run)):
        assert_same_variables(found, averaged)
    trained = checkpoints.variables_for(model, run, ema=False)
    for found in (load(run, ema=False).variables, trained):
        assert_same_variables(found, variables)
    checkpoints.convert(run, tmp_path / "x.pth", "official", ema=False)
    assert_same_variables(load(tmp_path / "x.pth", decoder_heads=4).variables, variables)


def test_a_file_without_a_telling_tensor(tmp_path: Path, variables) -> None:
    tensors = from_native(variables)
    del tensors["image_encoder.pos_embed"]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"lacks the tensor image_encoder\.pos_embed"):
        load(tmp_path / "x.safetensors", decoder_heads=4)


def test_an_incomplete_file_of_a_variant_is_told_all_that_it_lacks(tmp_path: Path) -> None:
    tensors = {
        name: np.asarray(array, np.float32)
        for name, array in weightless(VARIANTS["vit_ti"]).items()
        if name.startswith("image_encoder") and "neck" not in name
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(NamesError, match="Compared with vit_ti") as error:
        load(tmp_path / "x.safetensors", decoder_heads=8)
    for name in ("image_encoder.neck.0.weight", "mask_decoder.iou_token.weight"):
        assert f"missing: {name}" in str(error.value)


@pytest.mark.parametrize("heads", [0, -1, 5])
def test_impossible_heads_are_named(tmp_path: Path, variables, heads) -> None:
    save(tmp_path / "x", SQUARE, variables, "hugging-face")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["mask_decoder_config"]["num_attention_heads"] = heads
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"cannot have .* heads; .* divides its inner width 16"):
        load(tmp_path / "x")


def test_either_name_of_the_shared_positions_will_do(tmp_path: Path, variables) -> None:
    save(tmp_path / "x", SQUARE, variables, "hugging-face")
    path = tmp_path / "x" / "model.safetensors"
    tensors = files.read_tensors(path)
    one = "shared_image_embedding.positional_embedding"
    other = "prompt_encoder.shared_embedding.positional_embedding"
    tensors[other] = tensors[one]
    for names in ((one, other), (other,)):
        kept = {name: array for name, array in tensors.items() if name in names or name != one}
        write_safetensors(path, kept)
        assert_same_variables(load(tmp_path / "x").variables, variables)
        # The file alone has its folder's config, too.
        assert load(path).model.config == SQUARE


def test_windows_as_large_as_the_grid_are_not_forgotten(tmp_path: Path, variables) -> None:
    encoder = dataclasses.replace(SQUARE.image_encoder, image_size=(28, 28))
    small = dataclasses.replace(SQUARE, image_encoder=encoder)
    save(tmp_path / "x", small, random_variables(small), "hugging-face")
    assert load(tmp_path / "x").model.config == small
    # Tensors alone do not tell, but those of a variant.
    encoder = dataclasses.replace(VARIANTS["vit_ti"].image_encoder, image_size=(128, 128))
    small = dataclasses.replace(VARIANTS["vit_ti"], image_encoder=encoder)
    found = geometry.infer_config(weightless(small), "official", "x", geometry.Hints(8))
    assert geometry.variant_name(found) == "vit_ti"


def test_an_encoder_without_windows_is_read_back(tmp_path: Path) -> None:
    """Of a variant's width and depth, whose windows would have other tables."""
    variant = VARIANTS["vit_ti"]
    blocks = tuple(range(variant.image_encoder.depth))
    encoder = dataclasses.replace(variant.image_encoder, global_attention_blocks=blocks)
    config = dataclasses.replace(variant, image_encoder=encoder)
    found = geometry.infer_config(weightless(config), "official", "x", geometry.Hints(8))
    assert found.image_encoder.global_attention_blocks == blocks
    assert found.image_encoder.image_size == encoder.image_size


def test_heads_that_hugging_faces_config_lacks_may_be_given(tmp_path: Path, variables) -> None:
    save(tmp_path / "x", SQUARE, variables, "hugging-face")
    config = tmp_path / "x" / "config.json"
    content = json.loads(config.read_text())
    del content["mask_decoder_config"]["num_attention_heads"]
    config.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="--decoder-heads"):
        load(tmp_path / "x")
    assert load(tmp_path / "x", decoder_heads=4).model.config.mask_decoder.num_heads == 4


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("mask_decoder", {"num_heads": 8}, "decoder.num_heads is 4, expected 8"),
        ("image_encoder", {"window_size": 3}, "encoder.window_size is 7, expected 3"),
        (
            "image_encoder",
            {"global_attention_blocks": (0, 2)},
            "encoder.global_attention_blocks is (1,), expected (0, 2)",
        ),
        ("mask_decoder", {"mlp_dim": 44}, "decoder.mlp_dim is 40, expected 44"),
    ],
)
def test_weights_of_a_model_of_another_shape_are_refused(
    tmp_path: Path, variables, part: str, changes: dict, words: str
) -> None:
    save(tmp_path / "run", SQUARE, variables, "orbax")
    changed = dataclasses.replace(getattr(SQUARE, part), **changes)
    with pytest.raises(NamesError) as error:
        checkpoints.variables_for(
            Sam(dataclasses.replace(SQUARE, **{part: changed})), tmp_path / "run"
        )
    assert words in str(error.value)


@pytest.mark.parametrize("dtype", [np.int8, np.bool_])
def test_only_floating_point_is_weights(tmp_path: Path, variables, dtype) -> None:
    tensors = from_native(variables)
    name = "image_encoder.neck.1.bias"
    tensors[name] = tensors[name].astype(dtype)
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"neck\.1\.bias is (int8|bool), expected floating"):
        load(tmp_path / "x.safetensors", decoder_heads=4)


def test_a_damaged_run_is_named(tmp_path: Path, variables) -> None:
    save(tmp_path / "run", SQUARE, variables, "orbax")
    path = tmp_path / "run" / "checkpoints" / "0" / "model" / "_METADATA"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"checkpoints/0/model is damaged"):
        load(tmp_path / "run")


def test_places_that_will_not_do_are_found_before_the_work(tmp_path: Path, variables) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="is there already"):
        save(tmp_path / "file", SQUARE, variables, "orbax")
    with pytest.raises(WeightsError, match="is there already"):
        save(tmp_path, SQUARE, variables, "hugging-face")
    with pytest.raises(WeightsError, match="is a folder"):
        save(tmp_path, SQUARE, variables, "official")
    with pytest.raises(WeightsError, match="square images only"):
        save(tmp_path / "x", TINY, variables, "hugging-face")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_adapters_must_be_merged_first(tmp_path: Path, variables) -> None:
    adapted = {**variables, "lora": {"image_encoder": {"a": np.zeros(3)}}}
    with pytest.raises(NamesError, match="unexpected: lora/image_encoder/a"):
        save(tmp_path / "x", SQUARE, adapted, "hugging-face")
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_model_is_refused(tmp_path: Path, variables) -> None:
    save(tmp_path / "run", SQUARE, variables, "orbax")
    wider = dataclasses.replace(SQUARE.mask_decoder, mlp_dim=44)
    config = model_config_of(dataclasses.replace(SQUARE, mask_decoder=wider))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config)}))
    with pytest.raises(NamesError, match=r"misshapen: params/mask_decoder/.* expected \(32, 44\)"):
        load(tmp_path / "run")
    for content in ("{}", '{"model": null}', '{"model": [1]}', "nonsense"):
        (tmp_path / "run" / "config.json").write_text(content)
        with pytest.raises(WeightsError, match="expected JSON with a map 'model'"):
            load(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"model": {"variant": "vit_x"}}')
    with pytest.raises(WeightsError, match=r"config\.json: model\.variant = 'vit_x'"):
        load(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        load(tmp_path / "run")


def test_steps(tmp_path: Path, variables) -> None:
    save(tmp_path / "run", SQUARE, variables, "orbax")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; it has \[0\]"):
        load(tmp_path / "run", step=7)
    write_safetensors(tmp_path / "x.safetensors", from_native(variables))
    with pytest.raises(WeightsError, match="no training run"):
        load(tmp_path / "x.safetensors", step=7)


def test_a_name_on_the_hub(tmp_path: Path, variables, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs requirements-torch.lock")
    save(tmp_path / "x", SQUARE, variables, "hugging-face")
    asked = []

    def fetch(name, **options):
        asked.append(name)
        return str(tmp_path / "x")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert load("someone/sam").model.config == SQUARE
    assert asked == ["someone/sam"]

    def fail(name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(WeightsError, match=r"someone/sam does not exist here.*no route"):
        load("someone/sam")
    with pytest.raises(WeightsError, match=r"^no/such/file\.pth does not exist$"):
        load("no/such/file.pth")


def test_without_torch_and_hub_a_word_on_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "x.pth").write_bytes(b"\x80\x02")
    with pytest.raises(WeightsError, match=r"pip install 'sam-jax\[torch\]'"):
        files.read_tensors(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="pip install huggingface_hub"):
        load("someone/sam")


class TestMae:
    """Masked autoencoders."""

    def tensors(self, *, grid: int = 6, patch: int = 4, seed: int = 0):
        rng = np.random.default_rng(seed)
        encoder = {"params": {"image_encoder": random_variables(SQUARE)["params"]["image_encoder"]}}
        flat = flatten_dict(encoder, sep="/")
        from sam_jax.weights.names import foreign_names

        kept = {p: np.asarray(v) for p, v in flat.items() if foreign_names(p, "mae")}
        from flax.traverse_util import unflatten_dict

        tensors = from_native(unflatten_dict(kept, sep="/"), "mae")
        dim = SQUARE.image_encoder.embed_dim
        tensors["pos_embed"] = rng.standard_normal((1, 1 + grid**2, dim)).astype(np.float32)
        tensors["patch_embed.proj.weight"] = rng.standard_normal((dim, 3, patch, patch)).astype(
            np.float32
        )
        for name in ("cls_token", "mask_token", "norm.weight", "decoder_embed.weight"):
            tensors[name] = np.zeros(3, np.float32)
        return tensors

    def test_half_precision_becomes_float32(self) -> None:
        from sam_jax.weights.mae import start_from_mae

        half = {name: array.astype(np.float16) for name, array in self.tensors().items()}
        variables = start_from_mae(Sam(SQUARE), half, jax.random.key(0))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}

    def test_a_classifier_is_no_autoencoder(self) -> None:
        from sam_jax.weights.mae import start_from_mae

        tensors = self.tensors() | {"head.weight": np.zeros((10, 24), np.float32)}
        with pytest.raises(NamesError, match=r"unexpected: head\.weight"):
            start_from_mae(Sam(SQUARE), tensors, jax.random.key(0))

    def test_encoder_continues_and_the_rest_is_fresh(self) -> None:
        from sam_jax.weights.mae import start_from_mae

        tensors = self.tensors(grid=12)
        key = jax.random.key(3)
        variables = start_from_mae(Sam(SQUARE), tensors, key)
        fresh = init_variables(Sam(SQUARE), key)
        encoder = variables["params"]["image_encoder"]
        np.testing.assert_array_equal(
            encoder["block_02"]["mlp"]["dense_1"]["kernel"], tensors["blocks.2.mlp.fc2.weight"].T
        )
        np.testing.assert_array_equal(
            encoder["pos_embed"].reshape(144, -1), tensors["pos_embed"][0, 1:]
        )
        assert not np.any(encoder["block_01"]["attn"]["rel_pos_h"])
        for part in ("prompt_encoder", "mask_decoder"):
            jax.tree.map(
                np.testing.assert_array_equal, variables["params"][part], fresh["params"][part]
            )
        assert jax.tree.structure(variables) == jax.tree.structure(fresh)

    def test_positions_and_filters_are_interpolated_as_torch_does(self) -> None:
        torch = pytest.importorskip("torch", reason="needs requirements-torch.lock")
        from sam_jax.weights.mae import start_from_mae

        def resized(array, size):
            return torch.nn.functional.interpolate(
                torch.from_numpy(array), size=size, mode="bicubic", align_corners=False
            ).numpy()

        tensors = self.tensors(grid=5, patch=3)
        encoder = start_from_mae(Sam(SQUARE), tensors, jax.random.key(0))["params"]["image_encoder"]
        grid = tensors["pos_embed"][:, 1:].reshape(1, 5, 5, -1).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(
            encoder["pos_embed"], resized(grid, (12, 12))[0].transpose(1, 2, 0), atol=1e-5
        )
        filters = resized(tensors["patch_embed.proj.weight"], (4, 4))
        np.testing.assert_allclose(
            encoder["patch_embed"]["proj"]["kernel"].reshape(4, 4, 3, -1),
            filters.transpose(2, 3, 1, 0),
            atol=1e-5,
        )

    def test_another_encoder_is_refused_with_both_names(self) -> None:
        from sam_jax.weights.mae import start_from_mae

        tensors = self.tensors()
        tensors["blocks.1.mlp.fc1.weight"] = np.zeros((3, 3), np.float32)
        del tensors["blocks.0.norm1.bias"]
        with pytest.raises(NamesError, match="2 problems") as error:
            start_from_mae(Sam(SQUARE), tensors, jax.random.key(0))
        assert "blocks.1.mlp.fc1.weight (3, 3) (native params/image_encoder/block_01" in str(
            error.value
        )
        tensors["pos_embed"] = np.zeros((1, 7, 24), np.float32)
        with pytest.raises(WeightsError, match=r"pos_embed has shape \(1, 7, 24\)"):
            start_from_mae(Sam(SQUARE), tensors, jax.random.key(0))

    def test_the_variant_is_recognised(self, tmp_path: Path) -> None:
        path = tmp_path / "mae.safetensors"
        zero = np.zeros((), np.float32)
        tensors = {
            "cls_token": zero,
            "patch_embed.proj.weight": np.zeros((1280, 3, 1, 1), np.float32),
            **{f"blocks.{i}.attn.qkv.weight": zero for i in range(32)},
        }
        write_safetensors(path, tensors)
        assert open_weights(path).config == VARIANTS["vit_h"]
        with pytest.raises(WeightsError, match=r"masked autoencoder.*--seed"):
            load(path)
        del tensors["blocks.31.attn.qkv.weight"]
        write_safetensors(path, tensors)
        with pytest.raises(WeightsError, match="31 blocks of width 1280"):
            load(path, key=jax.random.key(0))
