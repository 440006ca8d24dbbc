"""DICOM folders in, volumes in HU with a patient-space affine and radiographs out; no network code."""
