_base_ = ["base/thumos_videos.py", "base/detector.py"]

window_size = 768
chunks = window_size // 16
layers = 12
opened = [dict(type="PrepareVideoInfo", format="mp4"), dict(type="mmaction.DecordInit", num_threads=4)]
trained = opened + [
    dict(type="LoadFrames", num_clips=1, method="random_trunc", trunc_len=window_size, trunc_thresh=0.75,
         crop_ratio=[0.9, 1.0], scale_factor=1),
    dict(type="mmaction.DecordDecode"),
    dict(type="mmaction.Resize", scale=(-1, 182)),
    dict(type="mmaction.RandomResizedCrop"),
    dict(type="mmaction.Resize", scale=(160, 160), keep_ratio=False),
    dict(type="mmaction.Flip", flip_ratio=0.5),
    dict(type="mmaction.ImgAug", transforms="default"),
    dict(type="mmaction.ColorJitter"),
    dict(type="mmaction.FormatShape", input_format="NCTHW"),
    dict(type="ConvertToTensor", keys=["imgs", "gt_segments", "gt_labels"]),
    dict(type="Collect", inputs="imgs", keys=["masks", "gt_segments", "gt_labels"]),
]
shown = opened + [
    dict(type="LoadFrames", num_clips=1, method="sliding_window", scale_factor=1),
    dict(type="mmaction.DecordDecode"),
    dict(type="mmaction.Resize", scale=(-1, 160)),
    dict(type="mmaction.CenterCrop", crop_size=160),
    dict(type="mmaction.FormatShape", input_format="NCTHW"),
    dict(type="ConvertToTensor", keys=["imgs"]),
    dict(type="Collect", inputs="imgs", keys=["masks"]),
]
dataset = dict(
    train=dict(pipeline=trained),
    val=dict(window_size=window_size, pipeline=shown),
    test=dict(window_size=window_size, pipeline=shown),
)
model = dict(
    backbone=dict(
        type="mmaction.Recognizer3D",
        backbone=dict(
            type="VisionTransformerAdapter",
            img_size=224, patch_size=16, embed_dims=384, depth=layers, num_heads=6, mlp_ratio=4, qkv_bias=True,
            num_frames=16, drop_path_rate=0.1, norm_cfg=dict(type="LN", eps=1e-6), return_feat_map=True,
            with_cp=True, total_frames=window_size, adapter_index=list(range(layers)),
        ),
        data_preprocessor=dict(
            type="mmaction.ActionDataPreprocessor", format_shape="NCTHW",
            mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        ),
        custom=dict(
            pretrain="pretrained/vit-small-p16_videomae-k400-pre_16x4x1_kinetics-400_my.pth",
            pre_processing_pipeline=[
                dict(type="Rearrange", keys=["frames"], ops="b n c (t1 t) h w -> (b t1) n c t h w", t1=chunks),
            ],
            post_processing_pipeline=[
                dict(type="Reduce", keys=["feats"], ops="b n c t h w -> b c t", reduction="mean"),
                dict(type="Rearrange", keys=["feats"], ops="(b t1) c t -> b c (t1 t)", t1=chunks),
                dict(type="Interpolate", keys=["feats"], size=window_size),
            ],
            norm_eval=False,
            freeze_backbone=False,
        ),
    ),
    projection=dict(in_channels=384, max_seq_len=window_size, attn_cfg=dict(n_mha_win_size=-1)),
)
loader = dict(batch_size=2, num_workers=2)
solver = dict(
    train=loader, val=loader, test=loader,
    clip_grad_norm=1, amp=True, fp16_compress=True, static_graph=True, ema=True,
)
optimizer = dict(
    type="AdamW", lr=1e-4, weight_decay=0.05, paramwise=True,
    backbone=dict(
        lr=0, weight_decay=0, custom=[dict(name="adapter", lr=2e-4, weight_decay=0.05)], exclude=["backbone"]
    ),
)
scheduler = dict(type="LinearWarmupCosineAnnealingLR", warmup_epoch=5, max_epoch=100)
inference = dict(load_from_raw_predictions=False, save_raw_prediction=False)
post_processing = dict(
    nms=dict(use_soft_nms=True, sigma=0.7, max_seg_num=2000, multiclass=True, voting_thresh=0.7), save_dict=False
)
workflow = dict(
    logging_interval=50, checkpoint_interval=2, val_loss_interval=-1, val_eval_interval=2, val_start_epoch=40,
    end_epoch=60,
)
work_dir = "exps/adatad_s"
