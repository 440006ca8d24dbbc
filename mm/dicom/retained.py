"""What de-identification keeps: an allowlist over PS3.15 Table E.1-1, so that nothing stays by being forgotten.

Kept is what it takes to read the pixels, to place them in the patient and to know how they were acquired. Numbers stay
unless the table names them; UIDs are mapped; everything else, text, persons and dates first, stays only if it is here.
"""

from typing import Final

from pydicom.datadict import tag_for_keyword


def _tags(names: str) -> frozenset[int]:
    found = frozenset(tag for tag in map(tag_for_keyword, names.split()) if tag is not None)
    assert len(found) == len(names.split()), "a keyword is mistyped or written twice"
    return found


NUMBERS: Final = frozenset(("AT", "DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"))
"""Value representations (PS3.5 section 6.2) that hold numbers alone."""

BINARY: Final = _tags("""
    BluePaletteColorLookupTableData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths
    FloatPixelData GreenPaletteColorLookupTableData LUTData PixelData RedPaletteColorLookupTableData
    SegmentedBluePaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
    SegmentedRedPaletteColorLookupTableData VectorGridData
""")

CODE_STRINGS: Final = _tags("""
    AcquisitionContrast AnatomicalOrientationType AngioFlag BodyPartExamined BurnedInAnnotation CollimatorShape
    ComplexImageComponent ContentQualification CorrectedImage CountsSource DecayCorrection DetectorConfiguration
    DetectorType DiffusionDirectionality DimensionOrganizationType ExposureModulationType FieldOfViewShape
    FrameLaterality FrameType ImageLaterality ImageType InPlanePhaseEncodingDirection Laterality
    LossyImageCompression LossyImageCompressionMethod Modality MRAcquisitionType PatientOrientation
    PatientPosition PhotometricInterpretation PixelIntensityRelationship PixelPresentation
    PixelSpacingCalibrationType PresentationIntentType PresentationLUTShape RecognizableVisualFeatures
    RotationDirection ScanningSequence ScanOptions SequenceVariant SeriesType ShutterShape SUVType Units
    ViewPosition VOILUTFunction VolumeBasedCalculationTechnique VolumetricProperties
""")

_WORDS: Final = """
    ABDOMEN ABDOMENPELVIS ADC ADDITION ANKLE ANGIO ANATOMIC ANT AORTA ARM ATTN AUTO AVERAGE AXIAL BEAT
    BIDIRECTIONAL BIPED BLADDER BONE BQML BRAIN BREAST CALCANEUS CARDIAC_GATING CATHETER CBCT CERVICAL CHEST
    CHESTABDOMEN CHESTABDPELVIS CIRCULAR CLAVICLE CNTS COCCYX COL COLON COLOR COMBINED COMPLEX CONSTANT CORONAL
    CSPINE DERIVED DIFFUSION DIRECT DIRECTIONAL DISTORTED DYNAMIC ECG ECTOMOGRAPHY ELBOW EMISSION EXTREMITY EYE
    FEMUR FFDL FFDR FFE FFP FFS FIDUCIAL FIESTA FILTER FINGER FLUID_ATTENUATED FLUOROSCOPY FOOT FOR FOREARM
    GALLBLADDER GATED GEOMETRY GRADIENT HAND HEAD HEADNECK HEART HELICAL HELICAL_CT HEXAGONAL HFDL HFDR HFP HFS
    HIP HUMERUS IDENTITY IMAGINARY INVERSE IR_CORRECTED ISO ISOTROPIC ISO_10918_1 ISO_14495_1 ISO_15444_1
    ITERATIVE JAW KIDNEY KNEE LEG LINEAR LINEAR_EXACT LIVER LLO LMLO LOCALIZER LOG LSPINE LUMBAR LUNG MAGNITUDE
    MAX_IP MEDIAN METABOLITE MIN_IP MIXED MLO MODE MONOCHROME MONOCHROME1 MONOCHROME2 MOSAIC MPR MTC NECK NONE
    NORM NOSE ONLY ORBIT ORIGINAL OSP OTHER PALETTE PANCREAS PATLOC PELVIS PERCENTAGE PERFUSION PHANTOM PHASE
    POLYGONAL PRESENTATION PRIMARY PROCESSING PRODUCT PROJECTION PROSTATE PROTON_DENSITY QUADRUPED QUANTITATIVE
    REAL RECTANGULAR REFORMATTED RESAMPLED RESEARCH RESPIRATORY RGB RIB ROW SAGITTAL SAMPLED SCINTILLATOR SCREEN
    SACRUM SCAPULA SECONDARY SHOULDER SIGMOID SINGLE SKULL SLANT SPINE SPIRAL SPLEEN SSPINE STATIC STERNUM STOMACH
    STORAGE SUBTRACTION T2_STAR TABLE TEMPORAL THORAX THYROID TIBIA TILED_FULL TILED_SPARSE TOE TOMO TOMOSYNTHESIS
    TRANSMISSION TRSS TSPINE UNDISTORTED UNKNOWN UNSPECIFIED UTERUS VALUE VELOCITY VOLUME WHOLE WHOLEBODY
    WHOLE_BODY WRIST XCCL XCCM YBR_FULL YBR_FULL_422 YBR_ICT YBR_PARTIAL_420 YBR_RCT YES ZYGOMA
"""
TERMS: Final = frozenset(_WORDS.split())
"""Words of code strings that are kept, beside those of one and two characters (PS3.3 defined terms, the usual ones)."""

ORIENTATION: Final = r"[APLRHF]{1,3}"
"""PatientOrientation (PS3.3 section C.7.6.1.1.1)."""

TEXTS: Final[dict[str, str]] = {
    "RescaleType": r"HU|US|OD|HU_MOD|PCT|MGML|Z_EFF|ED|EDW|CONCENTRATION|normalized",
    "ModalityLUTType": r"HU|US|OD",
    "ConvolutionKernel": r"[A-Z][a-z]?\d\d[a-z]?|FC\d\d|\d|STANDARD|BONE|BONEPLUS|CHEST|DETAIL|EDGE|LUNG|SOFT",
    "PatientAge": r"\d{3}[DWMY]",
    "PatientSex": r"[MFO]",
}
"""Keywords of attributes beside `CODE_STRINGS`, and what their values must look like to be kept."""

SEQUENCES: Final = _tags("""
    CTAcquisitionDetailsSequence CTAcquisitionTypeSequence CTExposureSequence CTGeometrySequence
    CTImageFrameTypeSequence CTPositionSequence CTReconstructionSequence CTTableDynamicsSequence
    CTXRayDetailsSequence DerivationImageSequence DiffusionBMatrixSequence DiffusionGradientDirectionSequence
    DimensionIndexSequence DimensionOrganizationSequence EnergyWindowInformationSequence EnergyWindowRangeSequence
    FrameAnatomySequence FrameContentSequence FrameVOILUTSequence ModalityLUTSequence MRAveragesSequence
    MRDiffusionSequence MREchoSequence MRFOVGeometrySequence MRImageFrameTypeSequence MRImagingModifierSequence
    MRModifierSequence MRTimingAndRelatedParametersSequence PerFrameFunctionalGroupsSequence PETFrameTypeSequence
    PixelMeasuresSequence PixelValueTransformationSequence PlaneOrientationSequence PlanePositionSequence
    RadiopharmaceuticalInformationSequence RealWorldValueMappingSequence ReferencedImageSequence
    ReferencedInstanceSequence ReferencedSeriesSequence SequenceOfUltrasoundRegions SharedFunctionalGroupsSequence
    SourceImageSequence TemporalPositionSequence VOILUTSequence
""")
"""Their items are cleaned by the same rules."""

CODE_SEQUENCES: Final = _tags("""
    AnatomicRegionModifierSequence AnatomicRegionSequence MeasurementUnitsCodeSequence
    PurposeOfReferenceCodeSequence RadionuclideCodeSequence ViewCodeSequence ViewModifierCodeSequence
""")
"""Their items are codes, of which public ones are kept (`CODES`)."""

CODES: Final[dict[str, str]] = {
    "SCT": r"\d{6,18}",
    "DCM": r"\d{6}",
    "SRT": r"[A-Z][A-Z0-9]?-[0-9A-F]{4,5}",
    "SNM3": r"[A-Z][A-Z0-9]?-[0-9A-F]{4,5}",
    "UCUM": r"1|%|\[hnsf'U\]|Bq/ml|g/ml|mm|mm2/s|ms|s|cm|deg",
}
"""Coding schemes (PS3.16 section 8) whose codes are kept, and what a code looks like; CodeMeaning is free text."""

EMPTIED: Final = _tags("Manufacturer PositionReferenceIndicator ReconstructionMethod")
"""Text that isn't in the table; some objects require the element (type 2), but not a value."""

DATES: Final = _tags("""
    AcquisitionDate AcquisitionDateTime AcquisitionTime ContentDate ContentTime ContrastBolusStartTime
    ContrastBolusStopTime DecayCorrectionDateTime EndAcquisitionDateTime FrameAcquisitionDateTime
    FrameReferenceDateTime RadiopharmaceuticalStartDateTime RadiopharmaceuticalStartTime
    RadiopharmaceuticalStopDateTime RadiopharmaceuticalStopTime SeriesDate SeriesTime StartAcquisitionDateTime
    StudyDate StudyTime
""")
"""Shifted where dates are kept: when the images were taken. Of birth, admission or prescription none is."""

CHARACTERISTICS: Final = _tags("PatientAge PatientSex PatientSize PatientWeight")
"""Kept where the patient's characteristics are."""
