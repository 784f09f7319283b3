"""Settings that fit a data set: what is measured of it, and the YAML file that follows."""
