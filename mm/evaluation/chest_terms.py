"""What radiologists call the findings of a chest X-ray and of a chest CT, in English, as patterns.

The 13 findings of the X-ray are those of CheXpert (Irvin et al. 2019, doi:10.1609/aaai.v33i01.3301590; its
fourteenth, "no finding", follows from them), the 18 of the CT those of CT-RATE (Hamamci et al. 2024,
arXiv:2403.17834). A nodule or granuloma is a lung lesion and no opacity; scars are sequelae and no opacity.
"""

from typing import Final

_DEVICE: Final = (
    r"(?<!pleural )\b(?:picc|(?:central |venous |arterial |picc )+lines?|catheters?|(?:\w+ )?tubes?|pacemakers?|pacer"
    r"|icd|aicd|defibrillator|port-?a-?cath|chest port|mediport|stents?|prosthe(?:sis|tic \w+)|valve replacement|clips?"
    r"|(?:sternal|sternotomy|cerclage) (?:wires?|sutures?)|wires|leads?(?! to)|hardware|devices?)\b"
)
_OPACITY: Final = (
    r"(?<!nodular )(?<!nodular lung )(?:opacit(?:y|ies)|opacifications?)|air ?-?space (?:disease|process)"
    r"|infiltrat(?:e|es|ion)"
    r"|interstitial (?:lung )?(?:markings?|patterns?|thickening|prominence|disease|changes)|increased (?:\w+ )?markings"
    r"|reticular (?:patterns?|markings?)|reticulations?|ground[- ]glass"
)
_SCAR: Final = (
    r"fibro(?:sis|tic)|scars?\b|scarring|sequelae? (?:changes|of (?:prior|old|previous) (?:infection|pneumonia))"
)
_EFFUSION: Final = r"(?<!pericardial )(?<!joint )effusions?|pleural fluid|(?:hydro|haemo|hemo)thorax"
_ATELECTASIS: Final = r"atelecta\w+|(?:lung|lobar|lobe|segmental) collapse|collapse of the (?:\w+ )*(?:lung|lobe)"
_CARDIOMEGALY: Final = (
    r"cardiomegaly|enlargement of the (?:heart|cardi\w+)|(?:cardiac|heart) enlargement|enlarged heart"
)
_ARTERY: Final = (
    r"(?:aort\w*|arter\w*|vascular|atherosclerotic|atheromatous)[^.;,]{0,40}?calcif\w+"
    r"|calcif\w+[^.;,]{0,40}?(?:aort\w+|arter\w+|atheroma\w*)"
)
_LYMPH: Final = r"(?:lymph)?adenopath\w+|(?:enlarged|pathological(?:ly enlarged)?) (?:\w+ ){0,3}lymph nodes?"

XRAY: Final[dict[str, str]] = {
    "enlarged_cardiomediastinum": r"mediastinal (?:widening|enlargement)|widened mediastinum",
    "cardiomegaly": _CARDIOMEGALY,
    "lung_opacity": _OPACITY,
    "lung_lesion": (
        r"(?<!thyroid )(?<!adrenal )nodules?\b|nodular (?:lung )?(?:opacit|densit)\w+|(?<!breast )\bmass(?:es)?\b"
        r"|granulomas?\b|cavit(?:y|ary) lesions?|tumou?rs?\b|neoplasms?\b|coin lesions?"
    ),
    "edema": r"(?<!soft tissue )o?edema|(?:vascular|pulmonary|venous) congestion|congestive heart failure|\bchf\b",
    "consolidation": r"consolidat\w+",
    "pneumonia": r"\w*pneumonias?\b|infectious process|infections?\b",
    "atelectasis": _ATELECTASIS,
    "pneumothorax": r"pneumothora(?:x|ces)",
    "pleural_effusion": _EFFUSION,
    "pleural_other": r"pleural (?:thickening|scar\w*|plaques?|calcif\w+)|fibrothorax",
    "fracture": r"fractur\w+|compression deformit(?:y|ies)",
    "support_devices": _DEVICE,
}

CT: Final[dict[str, str]] = {
    "medical_material": _DEVICE,
    "arterial_calcification": _ARTERY,
    "cardiomegaly": _CARDIOMEGALY,
    "pericardial_effusion": r"pericardial (?:effusions?|fluid)",
    "coronary_calcification": r"coronary[^.;]{0,40}?calcif\w+|calcif\w+[^.;]{0,40}?coronary",
    "hiatal_hernia": r"hiat(?:al|us) hernia",
    "lymphadenopathy": _LYMPH,
    "emphysema": r"emphysem\w+",
    "atelectasis": _ATELECTASIS,
    "lung_nodule": r"(?<!thyroid )(?<!adrenal )nodules?\b|nodular (?:lung )?(?:opacit|densit)\w+|granulomas?\b",
    "lung_opacity": _OPACITY,
    "fibrotic_sequela": _SCAR,
    "pleural_effusion": _EFFUSION,
    "mosaic_attenuation": r"mosaic (?:attenuation|perfusion|pattern)",
    "peribronchial_thickening": r"peribronchial (?:thickening|cuffing)|bronchial wall thickening",
    "consolidation": r"consolidat\w+",
    "bronchiectasis": r"bronchiecta\w+",
    "septal_thickening": r"(?:interlobular )?septal thickening|kerley",
}

ORGANS: Final[dict[str, str]] = {
    "cardiomegaly": r"\b(?:heart|cardiac|cardiomediastinal|cardiopericardial)\b",
    "enlarged_cardiomediastinum": r"\b(?:mediastin(?:um|al)|cardiomediastinal)\b",
}
"""Organs whose size is said to be normal, borderline or too large, without the finding's name."""

NORMAL: Final = r"not (?:\w+ )?enlarged|(?<!limits of )(?<!limit of )(?<!to )\bnormal\b|unremarkable"
BORDERLINE: Final = r"borderline|upper limits? of normal|top normal"
LARGE: Final = r"enlarged|enlargement|widened|dilated"

OTHER: Final = r"(?:no|without)(?: \w+){0,2} (?:change|increase|decrease|worsening|improvement|difference)s?\b"
"""Denies a change, not the finding."""
ABSENT: Final = (
    r"\bno\b|\bnot\b|\bwithout|absence of|free (?:of|from)|clear of|negative for|\bneither|\bnor\b|ruled? out"
    r"|exclude[sd]?\b|removal of|removed|resolution of|resolved|clearing of"
)
UNCERTAIN: Final = (
    r"possibl[ey]|probabl[ey]|\bmay\b|\bmight\b|\bcould\b|suspicious for|suspected|suspicion|cannot exclude"
    r"|can ?not be excluded|question(?:able|ed)?\b|concern(?:ing)? for|suggest(?:s|ing|ive)?\b|equivocal|likely"
    r"|correlate (?:clinically )?for|evaluate for|versus|\bvs\b|\beither\b|presumed"
)
ABSENT_BEHIND: Final = (
    r"(?:is|are|was|were|has been|have been) (?:not|absent|removed|excluded|unlikely)\b"
    r"|\b(?:has|have) (?:since |now )?(?:resolved|cleared)\b"
    r"|\bnot (?:seen|present|identified|demonstrated|evident|visualized|appreciated)|ruled out|\bunlikely\b|no longer"
)
UNCERTAIN_BEHIND: Final = (
    r"(?:cannot|can not|can't) be (?:entirely |completely )?(?:excluded|ruled out)|not (?:entirely )?excluded"
    r"|is (?:possible|suspected|questioned|questionable|not excluded)|\?"
)
ALTERNATIVE: Final = r"versus|vs\.?|or"
CLAUSE: Final = r"[.;:\n]|,? but |\bhowever\b|\balthough\b|\bthough\b|\bexcept\b|\bwhile\b|\bwhereas\b|\botherwise\b"
VERB: Final = r"\b(?:is|are|was|were|has|have|appears?|remains?|there|demonstrates?|shows?)\b"
