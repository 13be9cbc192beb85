root = "data/thumos-14"
truth = f"{root}/annotations/thumos_14_anno.json"
common = dict(
    ann_file=truth,
    class_map=root + "/annotations/category_idx.txt",
    data_path="%s/raw_data/video" % root,
    block_list=None,
    filter_gt=False,
    feature_stride=4,
    sample_stride=1,
)
tested = dict(type="ThumosSlidingDataset", subset_name="validation", window_size=256, **common)
dataset = dict(
    train=dict(type="ThumosPaddingDataset", subset_name="training", pipeline=[], **common),
    val=dict(window_overlap_ratio=0.25, pipeline=[], **tested),
    test=dict(window_overlap_ratio=0.5, test_mode=True, pipeline=[], **tested),
)
evaluation = dict(
    type="mAP", subset="validation", tiou_thresholds=[0.3, 0.4, 0.5, 0.6, 0.7], ground_truth_filename=truth
)
