"""Eight CC BY photos of COCO with instance masks: a COCO root. See ATTRIBUTION.md."""
