_base_ = ["base/anet_videos.py", "base/detector.py"]

steps, scale = 192, 4
chunks = steps * scale // 16
opened = [
    dict(type="PrepareVideoInfo", format="mp4", prefix="v_"),
    dict(type="mmaction.DecordInit", num_threads=4),
    dict(type="LoadFrames", num_clips=1, method="resize", scale_factor=scale),
    dict(type="mmaction.DecordDecode"),
]
shown = opened + [
    dict(type="mmaction.Resize", scale=(-1, 160)),
    dict(type="mmaction.CenterCrop", crop_size=160),
    dict(type="mmaction.FormatShape", input_format="NCTHW"),
    dict(type="ConvertToTensor", keys=["imgs"]),
    dict(type="Collect", inputs="imgs", keys=["masks"]),
]
trained = opened + [
    dict(type="mmaction.Resize", scale=(-1, 182)),
    dict(type="mmaction.RandomResizedCrop"),
    dict(type="mmaction.Resize", scale=(160, 160), keep_ratio=False),
    dict(type="mmaction.Flip", flip_ratio=0.5),
    dict(type="mmaction.ImgAug", transforms="default"),
    dict(type="mmaction.ColorJitter"),
    dict(type="mmaction.FormatShape", input_format="NCTHW"),
    dict(type="Collect", inputs="imgs", keys=["masks", "gt_segments", "gt_labels"]),
]
dataset = dict(
    train=dict(resize_length=steps, pipeline=trained),
    val=dict(resize_length=steps, pipeline=shown),
    test=dict(resize_length=steps, pipeline=shown),
)
model = dict(
    backbone=dict(
        type="mmaction.Recognizer3D",
        backbone=dict(
            type="VisionTransformerAdapter",
            img_size=224, patch_size=16, embed_dims=384, depth=12, num_heads=6, mlp_ratio=4, qkv_bias=True,
            num_frames=16, drop_path_rate=0.1, norm_cfg=dict(type="LN", eps=1e-6), return_feat_map=True,
            with_cp=True, total_frames=steps * scale, adapter_index=list(range(12)),
        ),
        data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
        custom=dict(
            pretrain="pretrained/vit-small-p16_videomae-k400-pre_16x4x1_kinetics-400_my.pth",
            pre_processing_pipeline=[
                dict(type="Rearrange", keys=["frames"], ops="b n c (t1 t) h w -> (b t1) n c t h w", t1=chunks),
            ],
            post_processing_pipeline=[
                dict(type="Reduce", keys=["feats"], ops="b n c t h w -> b c t", reduction="mean"),
                dict(type="Rearrange", keys=["feats"], ops="(b t1) c t -> b c (t1 t)", t1=chunks),
                dict(type="Interpolate", keys=["feats"], size=steps),
            ],
            freeze_backbone=False,
        ),
    ),
    projection=dict(
        in_channels=384, out_channels=256, attn_cfg=dict(n_mha_win_size=-1), use_abs_pe=True, max_seq_len=steps
    ),
    neck=dict(in_channels=256, out_channels=256),
    rpn_head=dict(
        in_channels=256, feat_channels=256, num_classes=1, label_smoothing=0.1, loss_weight=2.0, loss_normalizer=200
    ),
)
loader = dict(batch_size=16, num_workers=8)
solver = dict(train=loader, val=loader, test=loader, clip_grad_norm=1, amp=True, ema=True)
optimizer = dict(
    type="AdamW", lr=1e-3, weight_decay=0.05, paramwise=True,
    backbone=dict(
        lr=0, weight_decay=0, custom=[dict(name="adapter", lr=1e-4, weight_decay=0.05)], exclude=["backbone"]
    ),
)
scheduler = dict(type="LinearWarmupCosineAnnealingLR", warmup_epoch=5, max_epoch=15)
post_processing = dict(
    nms=dict(use_soft_nms=True, sigma=0.7, max_seg_num=100, min_score=0.001, multiclass=False, voting_thresh=0.9),
    external_cls=dict(
        type="CUHKANETClassifier", path="data/activitynet-1.3/classifiers/cuhk_val_simp_7.json", topk=2
    ),
)
workflow = dict(
    logging_interval=200, checkpoint_interval=1, val_loss_interval=-1, val_eval_interval=1, val_start_epoch=8
)
