"""Cases in, reports out: stages that load and write, checked when they are put together, run study by study."""
