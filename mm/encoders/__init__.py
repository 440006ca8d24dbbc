"""One modality to tokens each: volume, image, sound, record, text, and visits over time."""
