"""Volumes as NIfTI-1 files (https://nifti.nimh.nih.gov/nifti-1): one .nii.gz out, one .nii or .nii.gz in.

NIfTI stores its first axis fastest and speaks RAS; a `Volume` stores its last axis fastest and speaks LPS
(PS3.3 C.7.6.2.1.1). So the axes (i, j, k) of a file are (x, y, z) of a volume, voxels stay in the order they
have, and only the signs of two rows of the affine and the order of its columns change.
"""

import gzip
import importlib
import io
import math
import os
import stat
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Int16

from mm.dicom.errors import RefusedError
from mm.dicom.volume import MAX_VOXELS, Volume
from mm.files import write_atomically

SUFFIXES: Final = (".nii", ".nii.gz")
HEADER_BYTES: Final = 348
LONGEST_AXIS: Final = 32_767  # the header counts voxels in 16 bits
MAX_OFFSET: Final = 16 << 20  # header extensions lie before the voxels
DEFLATE_LIMIT: Final = 1032  # bytes that one byte of deflate can become
CHUNK: Final = 1 << 22  # voxels read at a time
SCANNER: Final = 1  # NIFTI_XFORM_SCANNER_ANAT
PATIENT_SPACES: Final = (SCANNER, 2)  # 2: aligned to another scan of the patient; from 3 on they are templates
MILLIMETRES: Final = (0, 2)  # xyzt_units; 0 is unknown, which every writer means as mm
RAS_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
COMPRESSION: Final = 1  # as nibabel does; 6 takes three times as long for 2 % of the size of a CT

NiftiReason = Literal[
    "not_nifti",
    "damaged",
    "truncated",
    "too_long",
    "not_3d",
    "too_many_voxels",
    "unsupported_type",
    "unsupported_unit",
    "invalid_scaling",
    "not_finite",
    "no_place",
]
NIFTI_REASONS: Final[dict[NiftiReason, str]] = {
    "not_nifti": "only NIfTI-1 in one file, .nii or .nii.gz, is read",
    "damaged": "its header or its compression is broken; a fresh copy may be read",
    "truncated": "it ends before the voxels that its header declares",
    "too_long": "it goes on after the voxels that its header declares",
    "not_3d": "only one 3-D volume a file is read; split a series in time or direction first",
    "too_many_voxels": f"at most {MAX_VOXELS:,} voxels, and {LONGEST_AXIS:,} along an axis, are read and written",
    "unsupported_type": "voxels must be integers or floats of 8 to 64 bits; neither colour nor complex is read",
    "unsupported_unit": "its header counts in another unit than millimetres; write it anew in mm",
    "invalid_scaling": "scl_inter isn't a number",
    "not_finite": "a voxel is NaN or infinite; write it anew with a number there",
    "no_place": "neither sform nor qform of code 1 or 2 is a finite, invertible affine, so its place is unknown",
}
assert set(NIFTI_REASONS) == set(get_args(NiftiReason))


class NiftiError(RefusedError[NiftiReason]):
    """A file or volume that isn't read from or written to NIfTI. Its message holds no path and no text of the file."""

    reasons = NIFTI_REASONS


def load_nibabel() -> ModuleType:
    """The package that knows the header.

    Raises:
        ImportError: It isn't installed; the message names the extra.
    """
    try:
        return importlib.import_module("nibabel")
    except ImportError as error:
        raise ImportError("NIfTI needs nibabel: pip install 'mm-report[nifti]'") from error


def _stored(voxels: Float[np.ndarray, "Z Y X"]) -> Int16[np.ndarray, "Z Y X"] | Float32[np.ndarray, "Z Y X"]:
    """As int16 where that loses nothing, else as float32. Slice by slice, for the memory's sake."""
    limits = np.iinfo(np.int16)
    for plane in voxels:
        whole = np.rint(plane) == plane  # false for NaN
        if not whole.all() or plane.min() < limits.min or plane.max() > limits.max:
            return voxels.astype(np.float32, copy=False)
    return voxels.astype(np.int16)


def write_nifti(volume: Volume, path: Path) -> Literal["int16", "float32"]:
    """Writes a volume whole or not at all, in the axes it is stored in.

    The affine becomes sform and qform, both of code 1 (scanner). A qform can't shear: where PixelSpacing's rows
    and columns aren't quite at a right angle it is the nearest rotation, and the sform is the truth. NIfTI has no
    field for HU; `intent_name`, the meaning of the data, holds "HU" where that is the unit.

    Args:
        volume: As read or resampled.
        path: Ends in .nii.gz, in an existing folder.

    Returns:
        The type of the voxels in the file: int16 where every value is a whole number that fits, else float32.

    Raises:
        NiftiError: `too_many_voxels` along an axis.
        ValueError: `path` has another suffix.
        ImportError: nibabel isn't installed.
        OSError: The disk is full or may not be written.
    """
    if not path.name.endswith(".nii.gz"):
        raise ValueError("a NIfTI file is written as .nii.gz; give a path that ends so")
    if max(volume.shape) > LONGEST_AXIS:
        raise NiftiError("too_many_voxels")
    nibabel = load_nibabel()
    voxels = _stored(volume.voxels)
    affine = RAS_LPS @ volume.affine[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), affine)
    image.set_sform(affine, code=SCANNER)
    image.set_qform(affine, code=SCANNER)
    image.header.set_xyzt_units(xyz="mm")
    image.header["intent_name"] = b"HU" if volume.units == "HU" else b""
    packed = io.BytesIO()
    # No name and no time inside: the same volume gives the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=COMPRESSION, mtime=0) as stream:
        image.to_stream(stream)
    write_atomically(path, packed.getvalue())
    return "int16" if voxels.dtype == np.int16 else "float32"


def _shape(header: Any) -> tuple[int, int, int]:
    """Voxels (i, j, k); further axes of one entry are none."""
    count, *sizes = (int(item) for item in header["dim"])
    if not 3 <= count <= 7 or min(sizes[:count]) < 1 or math.prod(sizes[3:count]) > 1:
        axes = " x ".join(map(str, sizes[: min(max(count, 0), 7)]))
        raise NiftiError("not_3d", f"its axes: {axes or 'none'}")
    if math.prod(sizes[:3]) > MAX_VOXELS:
        raise NiftiError("too_many_voxels")
    return sizes[0], sizes[1], sizes[2]


def _affine(header: Any) -> Float[np.ndarray, "4 4"]:
    """Voxel index (z, y, x, 1) to LPS mm, from the sform if it is the patient's, else from the qform."""
    try:
        ras, code = header.get_sform(coded=True)
        if code not in PATIENT_SPACES:
            ras, code = header.get_qform(coded=True)
    except (ValueError, load_nibabel().spatialimages.HeaderDataError):  # a quaternion or pixdim that is none
        raise NiftiError("no_place") from None
    if code not in PATIENT_SPACES or not np.isfinite(ras).all() or abs(np.linalg.det(ras[:3, :3])) < 1e-9:
        raise NiftiError("no_place")
    affine: Float[np.ndarray, "4 4"] = RAS_LPS @ np.asarray(ras, dtype=np.float64)[:, [2, 1, 0, 3]]
    return affine


def _exactly(file: io.BufferedIOBase, count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise NiftiError("truncated")
    return content


def _parse(file: io.BufferedIOBase, num_bytes: int, *, expands: int) -> Volume:
    """Reads a stream that holds at most `expands * num_bytes` bytes; every bound is checked before memory is taken."""
    nibabel = load_nibabel()
    block = _exactly(file, HEADER_BYTES)
    order = next((order for order in "<>" if struct.unpack(f"{order}i", block[:4])[0] == HEADER_BYTES), None)
    if order is None or block[344:] != b"n+1\0":
        raise NiftiError("not_nifti")
    header = nibabel.Nifti1Header(block, endianness=order, check=False)
    shape = _shape(header)
    affine = _affine(header)
    if int(header["xyzt_units"]) & 7 not in MILLIMETRES:
        raise NiftiError("unsupported_unit")
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError):
        raise NiftiError("unsupported_type") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise NiftiError("unsupported_type")
    try:
        slope, intercept = header.get_slope_inter()  # None, None where the header says not to scale
    except nibabel.spatialimages.HeaderDataError:
        raise NiftiError("invalid_scaling") from None
    offset = float(header["vox_offset"])
    if not HEADER_BYTES + 4 <= offset <= MAX_OFFSET or not offset.is_integer():
        raise NiftiError("damaged")
    if int(offset) + math.prod(shape) * dtype.itemsize > expands * num_bytes:
        raise NiftiError("truncated")
    _exactly(file, int(offset) - HEADER_BYTES)
    voxels = np.empty(shape[::-1], dtype=np.float32)
    flat = voxels.reshape(-1)
    for first in range(0, flat.size, CHUNK):
        out = flat[first : first + CHUNK]
        stored = np.frombuffer(_exactly(file, out.size * dtype.itemsize), dtype=dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            out[...] = stored if slope is None else stored.astype(np.float64) * slope + intercept
        if not np.isfinite(out).all():
            raise NiftiError("not_finite")
    if file.read(1):
        raise NiftiError("too_long")
    return Volume(voxels, affine, "HU" if header["intent_name"].item() == b"HU" else "arbitrary")


def read_nifti(path: str | Path) -> Volume:
    """Reads a 3-D NIfTI-1 file, whoever wrote it.

    The sform places it if its code is 1 or 2 (the patient's own space), else the qform under the same condition.
    Stored values are scaled once by scl_slope and scl_inter, in float64.

    Args:
        path: A .nii or .nii.gz file.

    Returns:
        Voxels float32 [Z Y X] in the axes of the file (k, j, i), affine in LPS mm, no SOPInstanceUIDs; in HU where
        `intent_name` says so, as `write_nifti` leaves it, else in arbitrary units.

    Raises:
        NiftiError: It isn't what is read, with the reason.
        ImportError: nibabel isn't installed.
        OSError: It can't be opened.
    """
    place = Path(path)
    if not place.name.lower().endswith(SUFFIXES):
        raise NiftiError("not_nifti")
    if not stat.S_ISREG(place.stat().st_mode):  # a pipe would block, a device never ends
        raise NiftiError("not_nifti")
    with place.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if not place.name.lower().endswith(".gz"):
            return _parse(file, num_bytes, expands=1)
        try:
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                return _parse(unpacked, num_bytes, expands=DEFLATE_LIMIT)
        except EOFError:
            raise NiftiError("truncated") from None
        except (gzip.BadGzipFile, zlib.error):
            raise NiftiError("damaged") from None
