"""Everything that parses, fed with what hypothesis makes of good files: `make fuzz`, and seconds of it in the suite."""
