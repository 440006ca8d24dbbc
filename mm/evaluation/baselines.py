"""What is to be had for nothing, or nearly: printed beside every phantom score.

`shallow` is the yardstick for the phantoms themselves: a logistic regression on a histogram of the volume, its
coarse grey values and the record. If it scores .6 macro-F1, the phantoms are a toy.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from mm import ontology
from mm.batch import Sample

_WORDS = 256


def truth_labels(samples: Sequence[Sample]) -> Bool[np.ndarray, "N K"]:
    """Which findings each study has, from its truth.

    Raises:
        ValueError: A sample has no truth.
    """
    result = np.zeros((len(samples), len(ontology.CODES)), dtype=bool)
    for row, sample in enumerate(samples):
        if sample.truth is None:
            raise ValueError(f"study {sample.study} has no truth to score against")
        for item in sample.truth.findings:
            result[row, ontology.INDEX[item.code]] |= item.present
    return result


def record_features(sample: Sample) -> Float[np.ndarray, " F"]:
    """Standardised measurements (0 where missing), what is missing, and hashed words."""
    values = np.zeros(len(ontology.MEASUREMENTS))
    missing = np.ones(len(ontology.MEASUREMENTS))
    words = np.zeros(_WORDS)
    if sample.record is not None:
        for name, value in sample.record.values.items():
            item = ontology.MEASUREMENTS[ontology.MEASUREMENT_INDEX[name]]
            number = np.log(max(value, 1e-6)) if item.log else value
            values[ontology.MEASUREMENT_INDEX[name]] = np.clip((number - item.mean) / item.sd, -5, 5)
            missing[ontology.MEASUREMENT_INDEX[name]] = 0
        for word in sample.record.words.lower().split():
            words[sum(ord(letter) * 31**place for place, letter in enumerate(word)) % _WORDS] = 1
    return np.concatenate([values, missing, words])


def shallow_features(sample: Sample) -> Float[np.ndarray, " F"]:
    """A 64-bin histogram of HU in [-1024, 1024), an 8x8x8 grid of mean HU, and the record."""
    if not sample.volumes:
        return np.concatenate([np.zeros(64 + 512), record_features(sample)])
    voxels = sample.volumes[0]
    counts, _ = np.histogram(np.clip(voxels, -1024, 1023), bins=64, range=(-1024, 1024))
    depth, height, width = (size // 8 for size in voxels.shape)
    cropped = voxels[: depth * 8, : height * 8, : width * 8]
    grid = cropped.reshape(8, depth, 8, height, 8, width).mean(axis=(1, 3, 5)) / 1000
    return np.concatenate([np.log1p(counts), grid.ravel(), record_features(sample)])


def constant(labels: Bool[np.ndarray, "N K"], *, positive: bool) -> Bool[np.ndarray, "N K"]:
    """The same answer for every study: all normal, or everything present."""
    return np.full_like(labels, positive)


def prevalence_random(
    labels: Bool[np.ndarray, "N K"], train: Bool[np.ndarray, "M K"], *, seed: int
) -> Bool[np.ndarray, "N K"]:
    """Each finding drawn with its prevalence in the training studies."""
    drawn: Bool[np.ndarray, "N K"] = np.random.default_rng(seed).random(labels.shape) < train.mean(axis=0)
    return drawn


def logistic(
    train_features: Float[np.ndarray, "M F"],
    train_labels: Bool[np.ndarray, "M K"],
    features: Float[np.ndarray, "N F"],
) -> Bool[np.ndarray, "N K"]:
    """One regularised logistic regression a finding, its threshold chosen for F1 on out-of-fold predictions.

    Raises:
        ImportError: scikit-learn is not installed (extra `evaluate`).
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import precision_recall_curve
        from sklearn.model_selection import cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("baselines need scikit-learn: pip install 'mm-report[evaluate]'") from error
    predicted = np.zeros((len(features), train_labels.shape[1]), dtype=bool)
    for column, truth in enumerate(train_labels.T):
        if truth.sum() < 3 or (~truth).sum() < 3:
            predicted[:, column] = truth.mean() > 0.5
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300, class_weight="balanced"))
        held_out = cross_val_predict(model, train_features, truth, cv=3, method="predict_proba")[:, 1]
        precision, recall, thresholds = precision_recall_curve(truth, held_out)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        threshold = thresholds[min(int(f1[:-1].argmax()), len(thresholds) - 1)]
        predicted[:, column] = model.fit(train_features, truth).predict_proba(features)[:, 1] >= threshold
    return predicted
