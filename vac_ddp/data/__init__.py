"""Videos on disk: index, groups, splits; decoding and clip sampling; sampler, data set, loader; augmentation."""
