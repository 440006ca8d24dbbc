"""The mixture-of-experts decoder that writes one sentence per slot."""
