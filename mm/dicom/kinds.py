"""SOP classes (PS3.4 annex B.5) and what they are to us."""

from typing import Final, Literal

Kind = Literal[
    "volume",
    "image",
    "localizer",
    "multiframe",
    "secondary_capture",
    "segmentation",
    "document",
    "presentation",
    "other",
]

MODALITIES: Final = frozenset((
    "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CD", "CF", "CP", "CR", "CS", "CT", "CTPROTOCOL", "DD", "DF", "DG",
    "DM", "DMS", "DOC", "DS", "DX", "EC", "ECG", "EEG", "EMG", "EOG", "EPS", "ES", "FA", "FID", "FS", "GM", "HC",
    "HD", "IO", "IOL", "IVOCT", "IVUS", "KER", "KO", "LEN", "LP", "LS", "M3D", "MA", "MG", "MR", "MS", "NM", "OAM",
    "OCT", "OP", "OPM", "OPR", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN", "POS", "PR", "PT", "PX",
    "REG", "RESP", "RF", "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD", "RTSEGANN",
    "RTSTRUCT", "RWV", "SEG", "SM", "SMR", "SR", "SRF", "ST", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "VF", "XA",
    "XAPROTOCOL", "XC",
))  # fmt: skip
"""Defined terms of Modality, retired ones included (PS3.3 section C.7.3.1.1.1)."""
OTHER: Final = "OT"
STORAGE: Final = "1.2.840.10008.5.1.4.1.1."
SINGLE_FRAME: Final = frozenset(STORAGE + tail for tail in ("2", "4", "128"))  # CT, MR, PET
RADIOGRAPHS: Final = frozenset(STORAGE + tail for tail in ("1", "1.1", "1.1.1"))  # CR, DX (presentation, processing)
MAMMOGRAMS: Final = frozenset(STORAGE + tail for tail in ("1.2", "1.2.1", "1.3", "1.3.1"))  # and intra-oral
MULTI_FRAME_CAPTURES: Final = frozenset(("7.1", "7.2", "7.3", "7.4"))
ENHANCED: Final = frozenset(
    # Enhanced and Legacy Converted CT, MR, PET; X-Ray 3D Angiographic and Craniofacial, Breast Tomosynthesis
    STORAGE + tail
    for tail in ("2.1", "2.2", "4.1", "4.4", "130", "128.1", "13.1.1", "13.1.2", "13.1.3")
)
"""Multi-frame objects whose functional groups say where each frame lies (PS3.3 C.7.6.16)."""
FLAT_FRAMES: Final = frozenset(
    # US, Enhanced MR Colour, captures, XA, RF and their enhanced kin, NM, endoscopy and microscopy in motion
    STORAGE + tail
    for tail in (
        *MULTI_FRAME_CAPTURES,
        *("3", "3.1", "4.3", "12.1", "12.1.1", "12.2", "12.2.1", "20"),
        *("77.1.1.1", "77.1.2.1", "77.1.4.1", "77.1.5.4", "77.1.6"),
    )
)
"""Multi-frame objects that are no stack of slices."""
IMAGES: Final = (
    SINGLE_FRAME
    | RADIOGRAPHS
    | MAMMOGRAMS
    | ENHANCED
    # Enhanced MR Colour, XA and RF, tomosynthesis projections, nuclear medicine
    | {STORAGE + tail for tail in ("4.3", "12.1", "12.1.1", "12.2", "12.2.1", "13.1.4", "13.1.5", "20")}
)
"""Images that seldom carry text."""
CAPTURES: Final = frozenset(
    # Secondary capture, ultrasound, endoscopy, microscopy, photographs.
    STORAGE + tail
    for tail in (
        *("7", "3", "3.1", "6", "6.1", "6.2"),
        *MULTI_FRAME_CAPTURES,
        *("77.1.1", "77.1.1.1", "77.1.2", "77.1.2.1", "77.1.4", "77.1.4.1", "77.1.5.1", "77.1.5.2"),
    )
)
"""Images whose pixels commonly show text or a face."""


def kind_of(sop_class_uid: str, modality: str, image_type: tuple[str, ...], num_frames: int) -> Kind:
    """What an object of a SOP class is to us.

    Args:
        sop_class_uid: SOPClassUID.
        modality: Modality; a Secondary Capture under CR or DX is an exported radiograph.
        image_type: ImageType, whose third value tells a localizer.
        num_frames: More than one in a class of single frames is no stack of slices.
    """
    tail = sop_class_uid.removeprefix(STORAGE)
    kind: Kind = "other"
    if sop_class_uid in SINGLE_FRAME | ENHANCED:
        kind = "localizer" if "LOCALIZER" in image_type[2:] else "volume"
    elif sop_class_uid in FLAT_FRAMES:
        kind = "multiframe"
    elif sop_class_uid in RADIOGRAPHS | MAMMOGRAMS or (tail == "7" and modality in ("CR", "DX")):
        kind = "image"
    elif tail == "7":
        kind = "secondary_capture"
    elif tail.startswith("66."):
        kind = "segmentation"
    elif tail.startswith(("88.", "104.")):
        kind = "document"
    elif tail.startswith("11."):
        kind = "presentation"
    is_flat = sop_class_uid not in ENHANCED and kind in ("volume", "image", "secondary_capture")
    return "multiframe" if is_flat and num_frames > 1 else kind
