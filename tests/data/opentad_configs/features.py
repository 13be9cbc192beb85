"""ActionFormer on features of whole videos: trained on random windows, tested whole."""

_base_ = ["base/detector.py"]
truth = "data/own/truth.json"
common = dict(
    type="ThumosPaddingDataset", ann_file=truth, class_map="data/own/classes.txt", data_path="data/own/features/",
    block_list="data/own/missing.txt", feature_stride=4, sample_stride=2, offset_frames=8,
)
read = [dict(type="LoadFeats", feat_format="npy", suffix="_rgb"), dict(type="ConvertToTensor", keys=["feats"])]
turned = [dict(type="Rearrange", keys=["feats"], ops="t c-> c t"), dict(type="Collect", inputs="feats", keys=["masks"])]
dataset = dict(
    train=dict(
        common, subset_name="training", filter_gt=True,
        pipeline=read + [dict(type="RandomTrunc", trunc_len=2304, trunc_thresh=0.5, crop_ratio=[0.9, 1.0])] + turned,
    ),
    val=dict(common, subset_name="validation", pipeline=read + turned),
    test=dict(common, subset_name=["validation"], test_mode=True, pipeline=read + turned),
)
evaluation = dict(type="mAP", subset="validation", tiou_thresholds=[0.5], ground_truth_filename=truth, top_k=[1, 5])
model = dict(projection=dict(in_channels=2048, input_pdrop=0.2))
solver = dict(train=dict(batch_size=2, num_workers=2), clip_grad_norm=-1)
optimizer = dict(type="AdamW", lr=1e-4, weight_decay=0.05, paramwise=True)
scheduler = dict(type="LinearWarmupCosineAnnealingLR", warmup_epoch=5, max_epoch=35)
post_processing = dict(
    pre_nms_topk=5000,
    nms=dict(_delete_=True, use_soft_nms=False, iou_threshold=0.5, max_seg_num=200, multiclass=True),
)
workflow = dict(logging_interval=20, checkpoint_interval=1, val_eval_interval=1, val_start_epoch=30)
