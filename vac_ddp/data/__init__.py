"""Frames on the disk to uint8 clips and device-side augmentation."""
