"""What every benchmark shares: the machine, fair timing, memory, models of real sizes, plots."""
