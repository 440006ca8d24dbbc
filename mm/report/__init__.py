"""Reports as data, the text they are filled with, and one writer a file; nothing here knows a network."""
