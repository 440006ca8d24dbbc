"""Folder to voxels: ours and its peers on the same files in one run, equal voxels asserted first.

python benchmarks/dicom_read.py [--json FILE] [--repeats 5] [--slices 300]

Warm cache, two threads for all that have them, repeats interleaved; seconds are the best and the median. Peak memory is
that of a process of its own (Linux): the largest resident set (VmHWM, set back before) less what it was when
everything was imported and four files were read. dcm2niix's is that of Python alone, not of its program.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dicom_peers as peers
import numpy as np
import pydicom
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from mm.dicom.resample import Grid, resample
from mm.dicom.scan import scan
from mm.dicom.volume import Volume, read_volume

SHAPE = (512, 512)
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"


def ours(folder: Path) -> np.ndarray:
    return our_volume(folder).voxels


def our_volume(folder: Path) -> Volume:
    (study,) = scan(folder).studies
    (series,) = study.series
    return read_volume(series)


def our_tensor(folder: Path, grid: Grid) -> Volume:
    return resample(our_volume(folder), grid)


def header(index: int, series: int, shape: tuple[int, int], step: float) -> Dataset:
    """One slice as a scanner writes it: about 80 elements, nested and private ones among them."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = CT, f"1.2.9.{series}.{index}"
    root = "1.2.826.0.1.3680043.8.498.7"
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "SOPClassUID": CT,
        "SOPInstanceUID": f"1.2.9.{series}.{index}", "StudyDate": "20240102", "SeriesDate": "20240102",
        "AcquisitionDate": "20240102", "ContentDate": "20240102", "StudyTime": "101112", "AcquisitionTime": "101113",
        "ContentTime": f"{101200 + index % 60}.{index}", "AccessionNumber": "A77", "Modality": "CT",
        "Manufacturer": "ACME Medical", "InstitutionName": "Hospital", "StationName": "CT1", "PatientName": "Doe^J",
        "StudyDescription": "Chest", "SeriesDescription": "Thin", "ManufacturerModelName": "Scan 64",
        "PatientID": "P77", "PatientBirthDate": "19600101", "PatientSex": "F", "PatientAge": "064Y",
        "BodyPartExamined": "CHEST", "ScanOptions": "HELICAL", "SliceThickness": step, "KVP": 120,
        "DataCollectionDiameter": 500, "SoftwareVersions": "1.2.3", "ProtocolName": "Thorax",
        "ReconstructionDiameter": 360, "DistanceSourceToDetector": 949, "DistanceSourceToPatient": 541,
        "GantryDetectorTilt": 0, "TableHeight": 150.5, "RotationDirection": "CW", "ExposureTime": 500,
        "XRayTubeCurrent": 200 + index % 7, "Exposure": 20, "FilterType": "BODY", "GeneratorPower": 24,
        "FocalSpots": 0.7, "ConvolutionKernel": "STANDARD", "PatientPosition": "FFS", "SpiralPitchFactor": 0.98,
        "StudyInstanceUID": f"{root}.1", "SeriesInstanceUID": f"{root}.1.{series}", "StudyID": "1",
        "SeriesNumber": series, "AcquisitionNumber": 1, "InstanceNumber": index + 1,
        "ImagePositionPatient": [-180, -180, round(step * index, 3)], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "FrameOfReferenceUID": f"{root}.2", "PositionReferenceIndicator": "SN", "SliceLocation": round(step * index, 3),
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": shape[0], "Columns": shape[1],
        "PixelSpacing": [0.703125, 0.703125], "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": 1, "WindowCenter": 40, "WindowWidth": 400, "RescaleIntercept": -1024, "RescaleSlope": 1,
        "RescaleType": "HU",
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(data, keyword, value)
    data.ReferencedStudySequence = [reference(f"{root}.3")]
    block = data.private_block(0x0009, "ACME 1", create=True)
    for element in range(8):
        block.add_new(element, "LO", f"private {element}")
    return data


def reference(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CT, uid
    return item


def save(path: Path, data: Dataset, pixels: np.ndarray, syntax: str | None = None) -> None:
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW"
    if syntax is not None:
        data.compress(syntax, generate_instance_uid=False)
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def body(count: int, shape: tuple[int, int], noise: float) -> np.ndarray:
    """A patient of sorts, stored integers (HU + 1024) [Z Y X]: air, a body, two lungs, noise."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in (count, *shape)), indexing="ij")
    values = np.where((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, 1064.0, 24.0).astype(np.float32)
    for side in (-0.35, 0.35):
        values[((x - side) / 0.25) ** 2 + (y / 0.4) ** 2 + (z / 0.7) ** 2 < 1] = 200.0
    values += 60 * np.sin(7 * x + 3 * z) * np.cos(5 * y)
    values += noise * rng.standard_normal(values.shape, dtype=np.float32)
    return values.clip(0, 4000).astype(np.int16)


def write_ct(folder: Path, count: int, noise: float = 12.0, syntax: str | None = None) -> Path:
    folder.mkdir()
    for index, plane in enumerate(body(count, SHAPE, noise)):
        save(folder / f"{index * 7919 % 10007:05d}.dcm", header(index, 1, SHAPE, 1.0), plane, syntax)
    return folder


def write_mr(folder: Path) -> Path:
    """600 files, 20 series, one of them with two echoes; about 200 elements each."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(600):
        series, index = divmod(number, 30)
        data = header(index if series else index // 2, series, (64, 64), 2.0)
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MR
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.8.{number}"
        data.Modality, data.MRAcquisitionType, data.EchoTime = "MR", "2D", 10.0 if series or number % 2 else 80.0
        data.EchoNumbers = 1 if data.EchoTime == 10 else 2
        data.RescaleIntercept, data.RescaleType = 0, "US"
        for group in (0x0019, 0x0021, 0x0051):
            block = data.private_block(group, "ACME MR", create=True)
            for element in range(36):
                block.add_new(element, "DS", [1.5, element])
        data.private_block(0x0029, "ACME CSA", create=True).add_new(1, "OB", rng.bytes(6000))
        nested = reference("1.2.3")
        nested.PurposeOfReferenceCodeSequence = [reference("1.2.4")]
        data.ReferencedImageSequence = [nested, reference("1.2.5")]
        save(folder / f"{number * 7 % 601:04d}", data, rng.integers(0, 900, (64, 64), dtype=np.int16))
    return folder


def our_series(folder: Path) -> list[np.ndarray]:
    series = [part for study in scan(folder).studies for part in study.series]
    return [read_volume(part).voxels for part in series if part.refused is None]


def pydicom_series(folder: Path) -> list[np.ndarray]:
    groups: dict[tuple[str, float], list[tuple[float, Path]]] = {}
    for path in folder.iterdir():
        head = pydicom.dcmread(path, stop_before_pixels=True)
        key = (str(head.SeriesInstanceUID), float(head.EchoTime))
        groups.setdefault(key, []).append((float(head.ImagePositionPatient[2]), path))
    return [
        np.stack([pydicom.dcmread(path).pixel_array for _, path in sorted(group)]).astype(np.float32)
        for _, group in sorted(groups.items())
    ]


def floor(files: list[tuple[Path, int]], out_shape: tuple[int, int, int]) -> np.ndarray:
    """What reading and rescaling cost alone: pread at a known offset into one array, two threads."""
    out = np.empty(out_shape, np.float32)

    def read(start: int) -> None:
        stored = np.empty(out_shape[1:], np.int16)
        for z in range(start, len(files), 2):
            with files[z][0].open("rb", buffering=0) as file:
                file.seek(files[z][1])
                file.readinto(stored)
            np.add(stored, np.float32(-1024), out=out[z], dtype=np.float32)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(2)))
    return out


def timed(readers: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, best and median, of interleaved repeats."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, read in readers.items():
            start = time.perf_counter()
            read()
            times[name].append(time.perf_counter() - start)
    return {name: {"best": min(all_), "median": statistics.median(all_)} for name, all_ in times.items()}


def equal(found: np.ndarray, expected: np.ndarray) -> bool:
    """Up to the directions of the axes, which packages choose for themselves."""
    turned = (found[:: -1 if turn & 4 else 1, :: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1] for turn in range(8))
    return found.shape == expected.shape and any(np.array_equal(item, expected) for item in turned)


def check(names: list[str], folder: Path, expected: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Peers that are there and read what we read."""
    found: dict[str, Callable[[], Any]] = {}
    for name in names:
        read = getattr(peers, name)
        try:
            voxels = read(folder)
        except ImportError:
            print(f"{name}: not installed")
            continue
        if not equal(voxels, expected):
            raise SystemExit(f"{name} reads other voxels")
        found[name] = lambda read=read: read(folder)
    return found


def peak_mb(folder: Path, name: str) -> float:
    """Of `ours` or a peer in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident_mb(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def print_peak(folder: Path, name: str) -> None:
    read = ours if name == "ours" else getattr(peers, name)
    with tempfile.TemporaryDirectory() as small:
        for path in sorted(folder.iterdir())[:4]:  # what is loaded at first use isn't the volume's
            (Path(small) / path.name).write_bytes(path.read_bytes())
        if name == "ours":
            scan(small)
        elif name != "dcm2niix":
            read(Path(small))
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set starts anew (proc(5))
    read(folder)
    print(resident_mb("VmHWM") - before)


def agreement(tensor: np.ndarray, to_ras: np.ndarray, mine: Volume) -> float:
    """Mean absolute difference, HU, of a peer's interior voxels from ours in the same places (trilinear)."""
    index = np.stack(np.meshgrid(*(np.arange(16, 80, 2),) * 3, indexing="ij")).reshape(3, -1)
    lps = np.diag([-1, -1, 1]) @ (to_ras[:3, :3] @ index + to_ras[:3, 3:])
    place = np.linalg.solve(mine.affine[:3, :3], lps - mine.affine[:3, 3:])
    scaled = 2 * place[::-1].T / (np.asarray(mine.shape)[::-1] - 1) - 1
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(mine.voxels)[None, None],
        torch.from_numpy(scaled).float()[None, None, None],
        align_corners=True,
    )
    return float(np.abs(sampled.numpy().ravel() - tensor[tuple(index)]).mean())


def show(title: str, times: dict[str, dict[str, float]], own: str = "ours") -> dict[str, Any]:
    print(f"\n{title}\n{'':24}{'best ms':>10}{'median ms':>11}{'of ours':>9}")
    for name, item in times.items():
        ratio = item["best"] / times[own]["best"]
        print(f"{name:24}{1e3 * item['best']:10.1f}{1e3 * item['median']:11.1f}{ratio:8.2f}x")
    return {"title": title, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--peak", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.peak:
        print_peak(Path(options.peak[1]), options.peak[0])
        return
    results: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {platform.platform()}"}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = write_ct(root / "ct", options.slices)
        (series,) = scan(folder).studies[0].series
        expected = read_volume(series).voxels
        names = ["dicomsdl", "dicomsdl_one_thread", "dcm2niix", "pydicom", "simpleitk", "monai"]
        readers = check(names, folder, expected)
        files = [(item.path, item.pixel_offset + 12) for item in series.instances]
        assert np.array_equal(floor(files, expected.shape), expected)
        cheap = {"ours": lambda: ours(folder), "floor": lambda: floor(files, expected.shape)}
        results["ct"] = show(
            f"{options.slices} x 512x512 int16 CT to float32 HU", timed(cheap | readers, options.repeats)
        )
        memory = {name: peak_mb(folder, name) for name in ("ours", *readers)}
        print(f"\npeak MB above the imports, the volume being {expected.nbytes / 2**20:.0f} MB:", memory)
        results["ct"]["peak_mb"] = memory

        if "monai" in readers:
            grid = Grid((96, 96, 96), (options.slices / 96, 360 / 96, 360 / 96))
            mine, (tensor, to_ras) = our_tensor(folder, grid), peers.monai_tensor(folder)
            difference = agreement(tensor, to_ras, mine)
            assert difference < 40, difference
            both = {"ours": lambda: our_tensor(folder, grid), "monai": lambda: peers.monai_tensor(folder)}
            results["tensor"] = show("folder to a 96^3 tensor", timed(both, min(3, options.repeats)))
            results["tensor"]["mean_difference_hu"] = difference
            print(f"mean absolute difference of interior voxels in the same places: {difference:.1f} HU")

        folder = write_mr(root / "mr")
        key = sorted(our_series(folder), key=lambda voxels: voxels.tobytes())
        theirs = sorted(pydicom_series(folder), key=lambda voxels: voxels.tobytes())
        same = sum(any(np.array_equal(item, other) for other in theirs) for item in key)
        print(f"\nMR volumes: {len(key)} of {len(theirs)} read, {same} with equal voxels")
        both = {"ours": lambda: our_series(folder), "pydicom": lambda: pydicom_series(folder)}
        results["mr"] = show("600 small MR files, long headers", timed(both, options.repeats))
        results["mr"]["volumes"] = [same, len(theirs)]

        for name, syntax in (("JPEG-LS", JPEGLSLossless), ("RLE", RLELossless), ("JPEG 2000", JPEG2000Lossless)):
            folder = write_ct(root / name, 64, syntax=syntax)
            readers = check(["simpleitk"], folder, ours(folder))
            every = {"ours": lambda folder=folder: ours(folder)} | readers
            results[name] = show(f"64 frames of 512x512, {name}", timed(every, min(3, options.repeats)))
    for package in ("dicomsdl", "dcm2niix", "pydicom", "SimpleITK", "monai", "numpy"):
        try:
            results[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            results[package] = "not installed"
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
