"""How other packages read a folder of slices, each as its own documentation does it; used by dicom_read.py.

Every function takes a folder and returns float32 [Z Y X] ordered along the normal (for some, mirrored), rescaled.
A package that isn't installed raises ImportError.
"""

import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def dicomsdl(folder: Path) -> np.ndarray:
    import dicomsdl as reader

    files = [reader.open_file(str(path)) for path in sorted(folder.iterdir())]
    files.sort(key=lambda data: data.ImagePositionPatient[2])
    out = np.empty((len(files), files[0].Rows, files[0].Columns), np.float32)

    def read(start: int) -> None:
        for z in range(start, len(files), 2):
            out[z] = files[z].pixelData()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(2)))
    return out


def dicomsdl_one_thread(folder: Path) -> np.ndarray:
    import dicomsdl as reader

    files = [reader.open_file(str(path)) for path in sorted(folder.iterdir())]
    files.sort(key=lambda data: data.ImagePositionPatient[2])
    out = np.empty((len(files), files[0].Rows, files[0].Columns), np.float32)
    for z, data in enumerate(files):
        out[z] = data.pixelData()
    return out


def dcm2niix(folder: Path) -> np.ndarray:
    """The program, with its NIfTI written to memory where /dev/shm is there; its voxels are mapped, not read."""
    from dcm2niix import bin as program

    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as target:
        command = [str(program), "-p", "n", "-z", "n", "-b", "n", "-f", "x", "-o", target, str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        (path,) = Path(target).glob("*.nii")
        head = path.read_bytes()[:352]
        shape = np.frombuffer(head, "<i2", 4, 40)[1:]
        kind = {4: "<i2", 512: "<u2", 16: "<f4"}[int(np.frombuffer(head, "<i2", 1, 70)[0])]
        slope, intercept = np.frombuffer(head, "<f4", 2, 112)
        stored = np.memmap(path, kind, "r", 352, tuple(shape[::-1].tolist()))
        return np.asarray(stored) * slope + intercept


def pydicom(folder: Path) -> np.ndarray:
    """Headers first, then the pixels in order."""
    import pydicom as reader

    heads = [(reader.dcmread(path, stop_before_pixels=True), path) for path in folder.iterdir()]
    heads.sort(key=lambda item: item[0].ImagePositionPatient[2])
    out = np.empty((len(heads), heads[0][0].Rows, heads[0][0].Columns), np.float32)
    for z, (head, path) in enumerate(heads):
        out[z] = reader.dcmread(path).pixel_array * float(head.RescaleSlope) + float(head.RescaleIntercept)
    return out


def simpleitk(folder: Path) -> np.ndarray:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(2)
    reader = SimpleITK.ImageSeriesReader()
    (series,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
    return SimpleITK.GetArrayFromImage(reader.Execute()).astype(np.float32)


def monai(folder: Path) -> np.ndarray:
    import torch
    from monai.transforms import LoadImage

    torch.set_num_threads(2)
    return LoadImage(reader="PydicomReader", image_only=True)(str(folder)).numpy().transpose(2, 1, 0)


def monai_tensor(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A 96^3 tensor [X Y Z] and its affine (index to RAS mm)."""
    import torch
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Resize, Spacing

    torch.set_num_threads(2)
    steps = Compose(
        [
            LoadImage(reader="PydicomReader", image_only=True),
            EnsureChannelFirst(),
            Spacing(pixdim=(2.0, 2.0, 2.0)),
            Resize((96, 96, 96)),
        ]
    )
    image = steps(str(folder))
    return image[0].numpy(), image.affine.numpy()
