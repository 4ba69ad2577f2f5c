"""One update of a model split over processes, beside TRL's."""
