"""City finder: maps any spelling of a place's name, in any script, to one of 234,908 cities."""
