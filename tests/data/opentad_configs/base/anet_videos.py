root = "data/activitynet-1.3"
truth = f"{root}/annotations/activity_net.v1-3.min.json"
videos = root + "/raw_data/Anet_videos_15fps_short256"
common = dict(
    type="AnetResizeDataset",
    ann_file=truth,
    class_map=root + "/annotations/category_idx.txt",
    data_path=videos,
    block_list=videos + "/missing_files.txt",
    resize_length=768,
    class_agnostic=True,
)
dataset = dict(
    train=dict(common, subset_name="training", filter_gt=True, pipeline=[]),
    val=dict(common, subset_name="validation", filter_gt=True, pipeline=[]),
    test=dict(common, subset_name="validation", filter_gt=False, test_mode=True, pipeline=[]),
)
evaluation = dict(
    type="mAP",
    subset="validation",
    tiou_thresholds=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
    ground_truth_filename=truth,
    blocked_videos=f"{root}/annotations/blocked.json",
)
