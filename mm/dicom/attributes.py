"""Elements of one file that only pictures need: read when the picture is, not kept of every instance."""

import io
from collections.abc import Sequence

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread, read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from mm.dicom.guard import guarded, inflate, open_file
from mm.dicom.header import PIXELS, behind_meta
from mm.dicom.instance import Instance


def read_attributes(instance: Instance, keywords: Sequence[str]) -> Dataset:
    """Some top-level elements, sequences with all they hold, each parsed. Not safe in threads.

    Raises:
        FileError: They can't be read.
    """
    tags: list[BaseTag | int] = [tag for tag in map(tag_for_keyword, keywords) if tag is not None]
    with guarded(), open_file(instance.path) as file:
        if instance.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
            data = read_dataset(
                io.BytesIO(inflate(behind_meta(file), instance.pixel_offset)),
                False,
                True,
                stop_when=lambda tag, _vr, _length: tag >= PIXELS,
                specific_tags=tags,
            )
        else:
            data = dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
        for keyword in keywords:
            data.get(keyword)  # pydicom parses here; later it would be out of the guard
        return data
