"""Hot paths: arrays in, arrays out. Nothing here knows of parameter trees."""
