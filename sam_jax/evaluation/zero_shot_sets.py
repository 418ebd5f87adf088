"""The 23 data sets of the paper's zero-shot evaluation from clicks, and how their files lie.

Sizes, splits and differences are the paper's; everything else says how far it was checked. Nobody
who wrote this has read all of the data sets: a layout of which public code gives evidence is marked
so, and what is from memory is, too.

The paper blurred the faces of people in all sets. That is not done here.

Source: Kirillov et al. 2023, appendix D.1, table 7 and figure 9.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sam_jax.errors import ConfigError

# What a mask is of: ``semantic`` ones are of a class of an image, all its objects together.
MaskKind = Literal["instance", "panoptic", "semantic"]
# What is known of a layout.
Evidence = Literal["public code", "memory", "ours"]

EVIDENCE: Mapping[Evidence, str] = {
    "public code": "as public code expects it that reads this set; no file of the set was seen",
    "memory": "not verified: from memory",
    "ours": "a layout of this project, into which the set must be brought",
}
# Fields of a source that are places below the set's folder.
_PLACES = ("path", "images", "masks")


@dataclasses.dataclass(frozen=True)
class ZeroShotSet:
    """One of the 23 data sets.

    Attributes:
      name: the paper's, and that of its folder.
      title: in full.
      num_images: of the paper's sample.
      num_masks: of the paper's sample.
      split: what the sample was drawn from.
      mask_kind: what a mask is.
      miou_over_ritm: SAM's mean IoU less RITM's after one centre click, in points.
      licence: none was verified; read the set's own terms before you load it down.
      origin: where it is published, and the publication.
      origin_verified: whether that place was seen named by others; otherwise it is from memory.
      layout: paths below the set's folder, and what is there.
      evidence: what the layout is known from.
      parts: the sources that read it, as fields of ``SourceConfig`` with paths below its folder.
      conversion: what must be done to the published files first; empty if nothing.
      notes: what else should be known; empty if nothing.
    """

    name: str
    title: str
    num_images: int
    num_masks: int
    split: str
    mask_kind: MaskKind
    miou_over_ritm: float
    licence: str
    origin: str
    origin_verified: bool
    layout: tuple[tuple[str, str], ...]
    evidence: Evidence
    parts: tuple[Mapping[str, Any], ...]
    conversion: str = ""
    notes: str = ""

    @property
    def reader(self) -> str:
        """The kind of source that reads it, with its form or encoding."""
        part = self.parts[0]
        form = part.get("form") or part.get("encoding")
        return f"{part['kind']} ({form})" if form else part["kind"]

    def source(self, folder: str | Path) -> dict[str, Any]:
        """Fields of the ``SourceConfig`` that reads it.

        Args:
          folder: the set's own folder.
        """
        parts = tuple(
            {
                field: str(Path(folder, value)) if field in _PLACES else value
                for field, value in part.items()
            }
            for part in self.parts
        )
        if len(parts) == 1:
            return {**parts[0], "name": self.name}
        return {"kind": "joined", "name": self.name, "parts": parts}


def find_set(name: str) -> ZeroShotSet:
    """The set of this name, in any case.

    Raises:
      ConfigError: there is none; names the nearest.
    """
    by_name = {found.name.casefold(): found for found in ZERO_SHOT_SETS}
    if found := by_name.get(name.casefold()):
        return found
    near = difflib.get_close_matches(name.casefold(), by_name, n=1)
    hint = f"did you mean {by_name[near[0]].name!r}?" if near else f"there are {', '.join(NAMES)}"
    raise ConfigError(f"no data set {name!r} of the paper's 23; {hint}")


def sets_in(
    folder: str | Path, names: Sequence[str] = ()
) -> tuple[list[ZeroShotSet], list[ZeroShotSet]]:
    """The sets whose folders are in a folder, and those that are missing.

    A folder that is there counts, whatever is in it: a set that is there in part is an error when
    it is opened, not one set less.

    Args:
      folder: where the sets are, each in a folder of its name.
      names: which sets are wanted; none is all.

    Raises:
      ConfigError: there is no set of a name.
      FileNotFoundError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    wanted = [find_set(name) for name in names] or list(ZERO_SHOT_SETS)
    is_there = {found.name: Path(folder, found.name).is_dir() for found in wanted}
    found = [one for one in wanted if is_there[one.name]]
    return found, [one for one in wanted if not is_there[one.name]]


ZERO_SHOT_SETS: tuple[ZeroShotSet, ...] = (
    ZeroShotSet(
        name="PPDLS",
        title="Plant Phenotyping Datasets, leaf segmentation",
        num_images=182,
        num_masks=2347,
        split="all",
        mask_kind="instance",
        miou_over_ritm=46.9,
        licence="research, by request (known, unverified)",
        origin="Plant Phenotyping Datasets (Minervini et al. 2016)",
        origin_verified=True,
        layout=(
            ("*/*_rgb.png", "images, in folders as Ara2012 and Tobacco"),
            ("*/*_label.png", "a label for each leaf"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "label_maps",
                "path": ".",
                "image_suffix": "_rgb.png",
                "mask_suffixes": ("_label.png",),
            },
        ),
        notes="The release holds more images than the paper's 182; which it took is not said.",
    ),
    ZeroShotSet(
        name="BBBC038v1",
        title="BBBC038v1 of the Broad Bioimage Benchmark Collection",
        num_images=227,
        num_masks=10506,
        split="train (stage 1)",
        mask_kind="instance",
        miou_over_ritm=44.7,
        licence="CC0 (said by a third party, unverified)",
        origin="Broad Bioimage Benchmark Collection, BBBC038 (Caicedo et al. 2019)",
        origin_verified=True,
        layout=(
            ("stage1_train/*/images/*.png", "the image, in a folder of its name"),
            ("stage1_train/*/masks/*.png", "a file for each nucleus"),
        ),
        evidence="public code",
        parts=({"kind": "image_folders", "path": "stage1_train"},),
    ),
    ZeroShotSet(
        name="DOORS",
        title="Dataset fOr bOuldeRs Segmentation",
        num_images=10000,
        num_masks=10000,
        split="DS1",
        mask_kind="instance",
        miou_over_ritm=41.1,
        licence="CC BY? (known, unverified)",
        origin="Zenodo record 7107409 (Pugliatti and Topputo 2022)",
        origin_verified=True,
        layout=(
            ("images/*.png", "images of DS1"),
            ("masks/*.png", "masks of the same names; what is not black is the boulder"),
        ),
        evidence="ours",
        parts=({"kind": "label_maps", "path": "images", "masks": "masks"},),
        conversion=(
            "Put DS1's images and the masks of its single boulders into two folders under the same "
            "names."
        ),
    ),
    ZeroShotSet(
        name="TimberSeg",
        title="TimberSeg 1.0",
        num_images=220,
        num_masks=2487,
        split="all",
        mask_kind="instance",
        miou_over_ritm=28.9,
        licence="unknown (unverified)",
        origin="Mendeley Data y5npsm3gkj (Fortin et al. 2022)",
        origin_verified=True,
        layout=(
            ("prescaled/coco_annotation_rotated.json", "COCO annotations"),
            ("prescaled/*.png", "images"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "coco",
                "path": "prescaled/coco_annotation_rotated.json",
                "images": "prescaled",
            },
        ),
    ),
    ZeroShotSet(
        name="NDD20",
        title="Northumberland Dolphin Dataset 2020",
        num_images=4402,
        num_masks=6100,
        split="all",
        mask_kind="instance",
        miou_over_ritm=21.1,
        licence="unknown (unverified)",
        origin="Newcastle University, data.ncl.ac.uk (Trotter et al. 2020)",
        origin_verified=True,
        layout=(
            ("ABOVE_LABELS.json", "polygons of the VGG Image Annotator"),
            ("ABOVE/*.jpg", "images above water"),
            ("BELOW_LABELS.json", "polygons of the VGG Image Annotator"),
            ("BELOW/*.jpg", "images below water"),
        ),
        evidence="public code",
        parts=(
            {"kind": "polygons", "form": "via", "path": "ABOVE_LABELS.json", "images": "ABOVE"},
            {"kind": "polygons", "form": "via", "path": "BELOW_LABELS.json", "images": "BELOW"},
        ),
    ),
    ZeroShotSet(
        name="LVIS",
        title="Large Vocabulary Instance Segmentation v0.5",
        num_images=945,
        num_masks=9642,
        split="val (v0.5)",
        mask_kind="instance",
        miou_over_ritm=18.5,
        licence="CC BY 4.0 annotations, Flickr images (known, unverified)",
        origin="lvisdataset.org, images of cocodataset.org (Gupta et al. 2019)",
        origin_verified=True,
        layout=(
            ("lvis_v0.5_val.json", "annotations"),
            ("val2017/*.jpg", "COCO's validation images of 2017"),
        ),
        evidence="public code",
        parts=({"kind": "coco", "path": "lvis_v0.5_val.json", "images": "val2017"},),
        notes="Version 1 is read as well, but is another set: other images, other masks.",
    ),
    ZeroShotSet(
        name="STREETS",
        title="STREETS: traffic cameras of Lake County",
        num_images=819,
        num_masks=9854,
        split="all",
        mask_kind="instance",
        miou_over_ritm=17.3,
        licence="unknown (unverified)",
        origin="Illinois Data Bank (Snyder and Do 2019)",
        origin_verified=False,
        layout=(
            ("annotations.json", "COCO annotations of the vehicles"),
            ("images/*.jpg", "images"),
        ),
        evidence="ours",
        parts=({"kind": "coco", "path": "annotations.json", "images": "images"},),
        conversion=(
            "The form of its annotations was not seen. Write its polygons as COCO's; files of VIA "
            "or LabelMe can be read as they are by a source of kind polygons in a config of your "
            "own."
        ),
    ),
    ZeroShotSet(
        name="ZeroWaste-f",
        title="ZeroWaste-f",
        num_images=2947,
        num_masks=6155,
        split="train",
        mask_kind="instance",
        miou_over_ritm=9.1,
        licence="CC BY-NC 4.0? (known, unverified)",
        origin="ai.bu.edu/zerowaste (Bashkirova et al. 2022)",
        origin_verified=False,
        layout=(
            ("splits_final_deblurred/train/labels.json", "COCO annotations"),
            ("splits_final_deblurred/train/data/*.PNG", "images"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "coco",
                "path": "splits_final_deblurred/train/labels.json",
                "images": "splits_final_deblurred/train/data",
            },
        ),
    ),
    ZeroShotSet(
        name="iShape",
        title="iShape: irregular shapes",
        num_images=754,
        num_masks=9742,
        split="val",
        mask_kind="instance",
        miou_over_ritm=8.8,
        licence="unknown (unverified)",
        origin="ishape.github.io (Yang et al. 2021)",
        origin_verified=True,
        layout=tuple(
            line
            for part in ("antenna", "branch", "fence", "hanger", "log", "wire")
            for line in (
                (f"{part}/val/image/*.jpg", "images"),
                (f"{part}/val/instance_map/*.png", "a label for each object"),
            )
        ),
        evidence="public code",
        parts=tuple(
            {
                "kind": "label_maps",
                "path": f"{part}/val/image",
                "masks": f"{part}/val/instance_map",
            }
            for part in ("antenna", "branch", "fence", "hanger", "log", "wire")
        ),
        notes=(
            "Seen for antenna alone; whether labels are grey values or colours was not, and both "
            "are read."
        ),
    ),
    ZeroShotSet(
        name="ADE20K",
        title="ADE20K, objects and parts",
        num_images=302,
        num_masks=10128,
        split="val",
        mask_kind="instance",
        miou_over_ritm=7.8,
        licence="non-commercial images (known, unverified)",
        origin="groups.csail.mit.edu/vision/datasets/ADE20K (Zhou et al. 2019)",
        origin_verified=False,
        layout=(
            ("images/ADE/validation/*/*/*.jpg", "images"),
            ("images/ADE/validation/*/*/*_seg.png", "classes in red and green, objects in blue"),
            ("images/ADE/validation/*/*/*_parts_*.png", "the same of parts, where there are any"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "label_maps",
                "encoding": "ade20k",
                "path": "images/ADE/validation",
                "image_suffix": ".jpg",
                "mask_suffixes": ("_seg.png", "_parts_*.png"),
            },
        ),
        notes="The release of 2021; the paper does not say how it chose among objects and parts.",
    ),
    ZeroShotSet(
        name="OVIS",
        title="Occluded Video Instance Segmentation",
        num_images=2044,
        num_masks=10011,
        split="train",
        mask_kind="instance",
        miou_over_ritm=7.0,
        licence="CC BY-NC-SA (known, unverified)",
        origin="songbai.site/ovis (Qi et al. 2022)",
        origin_verified=False,
        layout=(
            ("annotations_train.json", "annotations in the form of YouTube-VIS"),
            ("train/*/*.jpg", "frames, in a folder for each video"),
        ),
        evidence="memory",
        parts=({"kind": "video_coco", "path": "annotations_train.json", "images": "train"},),
    ),
    ZeroShotSet(
        name="Hypersim",
        title="Hypersim",
        num_images=338,
        num_masks=9445,
        split="archinteriors 1-55 but 20, 25, 40, 49",
        mask_kind="instance",
        miou_over_ritm=6.1,
        licence="CC BY-SA 3.0 (said by a third party, unverified)",
        origin="github.com/apple/ml-hypersim (Roberts et al. 2021)",
        origin_verified=True,
        layout=(
            ("images/*.jpg", "tone-mapped frames, as ai_001_001_cam_00_frame_0000.jpg"),
            ("labels/*.npy", "the instance of each pixel, under the same names; -1 is none"),
        ),
        evidence="ours",
        parts=(
            {
                "kind": "label_maps",
                "path": "images",
                "masks": "labels",
                "image_suffix": ".jpg",
                "mask_suffixes": (".npy",),
                "background": -1,
            },
        ),
        conversion=(
            "Labels are HDF5, which is not read here. For each frame, images/"
            "scene_cam_00_final_preview/frame.0000.tonemap.jpg of a scene becomes images/NAME.jpg, "
            "and images/scene_cam_00_geometry_hdf5/frame.0000.semantic_instance.hdf5 becomes "
            "labels/NAME.npy by numpy.save(target, h5py.File(source)['dataset'][:])."
        ),
    ),
    ZeroShotSet(
        name="NDISPark",
        title="Night and Day Instance Segmented Park",
        num_images=111,
        num_masks=2577,
        split="train",
        mask_kind="instance",
        miou_over_ritm=2.7,
        licence="Zenodo, unknown (unverified)",
        origin="Zenodo (Ciampi et al. 2021, 2022)",
        origin_verified=False,
        layout=(
            ("train/train_coco_annotations.json", "COCO annotations"),
            ("train/imgs/*.jpg", "images"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "coco",
                "path": "train/train_coco_annotations.json",
                "images": "train/imgs",
            },
        ),
        notes="112 images have 2,577 objects, one of them none: the paper's sample is all of it.",
    ),
    ZeroShotSet(
        name="VISOR",
        title="EPIC-KITCHENS VISOR",
        num_images=1864,
        num_masks=10141,
        split="val",
        mask_kind="instance",
        miou_over_ritm=1.8,
        licence="CC BY-NC 4.0 (known, unverified)",
        origin="epic-kitchens.github.io/VISOR (Darkhalil et al. 2022)",
        origin_verified=True,
        layout=(
            (
                "GroundTruth-SparseAnnotations/annotations/val/*.json",
                "polygons, a file for each video",
            ),
            (
                "GroundTruth-SparseAnnotations/rgb_frames/val/*/*/*.jpg",
                "frames, as P01/P01_107/P01_107_frame_0000000123.jpg",
            ),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "polygons",
                "form": "visor",
                "path": "GroundTruth-SparseAnnotations/annotations/val",
                "images": "GroundTruth-SparseAnnotations/rgb_frames/val",
            },
        ),
        conversion="Unpack the zip of each video beside it, into a folder of its name.",
        notes=(
            "Polygons of one object are united; a hole that is drawn as a polygon of its own is "
            "filled."
        ),
    ),
    ZeroShotSet(
        name="Plittersdorf",
        title="Plittersdorf, wildlife of the SOCRATES camera trap",
        num_images=187,
        num_masks=546,
        split="train, val, test",
        mask_kind="instance",
        miou_over_ritm=1.5,
        licence="unknown (unverified)",
        origin="the publication of SOCRATES (Haucke et al. 2022)",
        origin_verified=False,
        layout=(
            ("train.json", "COCO annotations"),
            ("val.json", "COCO annotations"),
            ("test.json", "COCO annotations"),
            ("images/*.jpg", "images of all three"),
        ),
        evidence="public code",
        parts=tuple(
            {"kind": "coco", "path": f"{split}.json", "images": "images"}
            for split in ("train", "val", "test")
        ),
    ),
    ZeroShotSet(
        name="EgoHOS",
        title="Egocentric Hand-Object Segmentation",
        num_images=2940,
        num_masks=9961,
        split="train (Ego4D, THU-READ)",
        mask_kind="instance",
        miou_over_ritm=0.8,
        licence="Ego4D terms (known, unverified)",
        origin="github.com/owenzlz/EgoHOS (Zhang et al. 2022)",
        origin_verified=True,
        layout=(
            ("train/image/ego4d_*.jpg", "images of Ego4D"),
            ("train/image/thu_*.jpg", "images of THU-READ"),
            ("train/label/*.png", "a label for each hand and what it holds, of the same names"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "label_maps",
                "path": "train/image",
                "masks": "train/label",
                "include": ("[eE]go4[dD]*", "[tT][hH][uU]*"),
            },
        ),
        notes=(
            "That names begin with the set that an image is of is not verified; others are left "
            "out, and counted."
        ),
    ),
    ZeroShotSet(
        name="IBD",
        title="InstanceBuilding 2D",
        num_images=467,
        num_masks=11953,
        split="train (2D)",
        mask_kind="instance",
        miou_over_ritm=-0.3,
        licence="unknown (unverified)",
        origin="the publication of InstanceBuilding (Chen et al. 2022)",
        origin_verified=False,
        layout=(
            ("train.json", "COCO annotations of the roofs"),
            ("train/*.png", "images"),
        ),
        evidence="ours",
        parts=({"kind": "coco", "path": "train.json", "images": "train"},),
        conversion="The form of its 2D annotations was not seen. Write them as COCO's.",
    ),
    ZeroShotSet(
        name="WoodScape",
        title="WoodScape, fisheye cameras of cars",
        num_images=107,
        num_masks=10266,
        split="set 1",
        mask_kind="instance",
        miou_over_ritm=-0.6,
        licence="non-commercial custom (known, unverified)",
        origin="github.com/valeoai/WoodScape (Yogamani et al. 2019)",
        origin_verified=True,
        layout=(
            ("rgb_images/*.png", "images"),
            ("instance_annotations/*.json", "polygons, a file for each image"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "polygons",
                "form": "woodscape",
                "path": "instance_annotations",
                "images": "rgb_images",
            },
        ),
        notes=(
            "Every polygon is an object, void and the car itself included: what the paper left out "
            "is not said. skip_labels leaves labels out."
        ),
    ),
    ZeroShotSet(
        name="Cityscapes",
        title="Cityscapes",
        num_images=293,
        num_masks=9973,
        split="val",
        mask_kind="panoptic",
        miou_over_ritm=-2.0,
        licence="non-commercial custom (known, unverified)",
        origin="cityscapes-dataset.com (Cordts et al. 2016)",
        origin_verified=False,
        layout=(
            ("leftImg8bit/val/*/*_leftImg8bit.png", "images"),
            ("gtFine/val/*/*_gtFine_instanceIds.png", "classes and objects"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "label_maps",
                "encoding": "cityscapes",
                "path": "leftImg8bit/val",
                "masks": "gtFine/val",
                "image_suffix": "_leftImg8bit.png",
                "mask_suffixes": ("_gtFine_instanceIds.png",),
            },
        ),
        notes=(
            "Things and stuff of the 19 classes that Cityscapes evaluates on; groups of things are "
            "left out, as its panoptic files mark them."
        ),
    ),
    ZeroShotSet(
        name="PIDRay",
        title="PIDray, prohibited items in baggage",
        num_images=3733,
        num_masks=8892,
        split="test (hard)",
        mask_kind="instance",
        miou_over_ritm=-5.8,
        licence="academic (known, unverified)",
        origin="github.com/lutao2021/PIDray (Wang et al. 2021)",
        origin_verified=True,
        layout=(
            ("annotations/xray_test_hard.json", "COCO annotations"),
            ("hard/*", "images"),
        ),
        evidence="public code",
        parts=({"kind": "coco", "path": "annotations/xray_test_hard.json", "images": "hard"},),
    ),
    ZeroShotSet(
        name="DRAM",
        title="Diverse Realism in Art Movements",
        num_images=718,
        num_masks=1179,
        split="test",
        mask_kind="semantic",
        miou_over_ritm=-6.5,
        licence="unknown (unverified)",
        origin="nadavc220.github.io/ssiap (Cohen et al. 2022)",
        origin_verified=True,
        layout=(
            ("test/**/*.jpg", "images, in folders of movements and artists"),
            ("labels/**/*.png", "classes as Pascal VOC's, in the same folders"),
        ),
        evidence="memory",
        parts=(
            {
                "kind": "label_maps",
                "path": "test",
                "masks": "labels",
                "ignore_labels": (255,),
            },
        ),
        notes="Each class of an image is one mask.",
    ),
    ZeroShotSet(
        name="TrashCan",
        title="TrashCan 1.0",
        num_images=5936,
        num_masks=9540,
        split="train (instance)",
        mask_kind="instance",
        miou_over_ritm=-15.0,
        licence=(
            "free academic; JAMSTEC permission for commercial (said by a third party, unverified)"
        ),
        origin="University of Minnesota's data repository (Hong et al. 2020)",
        origin_verified=True,
        layout=(
            ("instance_version/instances_train_trashcan.json", "COCO annotations"),
            ("instance_version/train/*.jpg", "images"),
        ),
        evidence="public code",
        parts=(
            {
                "kind": "coco",
                "path": "instance_version/instances_train_trashcan.json",
                "images": "instance_version/train",
            },
        ),
    ),
    ZeroShotSet(
        name="GTEA",
        title="Georgia Tech Egocentric Activity, hands",
        num_images=652,
        num_masks=1208,
        split="train (segmenting hands)",
        mask_kind="instance",
        miou_over_ritm=-21.4,
        licence="unknown (unverified)",
        origin="Georgia Tech Egocentric Activity Datasets (Fathi et al. 2011, Li et al. 2015)",
        origin_verified=True,
        layout=(
            ("Images/*.jpg", "images"),
            ("Masks/*.png", "hands, of the same names"),
        ),
        evidence="memory",
        parts=({"kind": "label_maps", "path": "Images", "masks": "Masks", "components": True},),
        notes=(
            "Masks do not tell hands apart: each connected piece is taken for one. How the paper "
            "made 1,208 masks of 652 images is not said."
        ),
    ),
)

NAMES: tuple[str, ...] = tuple(found.name for found in ZERO_SHOT_SETS)
