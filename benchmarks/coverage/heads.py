"""The head of each network of the further libraries, named by hand.

The table was written from the networks' source before any of them was given to convlora. An entry holds the names of
the layers, or patterns of them; an empty entry says that the network returns features or embeddings, so that no layer
is new. Two kinds of output layers are left out: those of intermediate results that only the loss of pretraining uses
(a VAE's mean and variance), and constants (a YOLO's ``dfl.conv``).
"""

from __future__ import annotations

import fnmatch

from torch import nn
from torch.nn.modules.conv import _ConvNd

YOLO = "*.cv2.?.2 *.cv3.?.2"
BOTH = f"{YOLO} *.one2one_cv2.?.2 *.one2one_cv3.?.2"
PCV = "output"
FINAL_AND_AUX = "final_block.conv2 aux_block.conv2"
LAST, UP = "conv_last", "upsampler.0"

HEADS = {
    **{
        f"ultralytics/{name}": YOLO
        for name in ["yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-p2", "yolov8n-ghost"]
    },
    **{f"ultralytics/{name}": YOLO for name in ["yolov9t", "yolo11n", "yolo12n"]},
    **{f"ultralytics/{name}": BOTH for name in ["yolov10n", "yolo26n", "yolo26n-p2"]},
    "ultralytics/yolov8n-seg": f"{YOLO} *.cv4.?.2",
    "ultralytics/yolo11n-seg": f"{YOLO} *.cv4.?.2",
    "ultralytics/yolo26n-seg": f"{BOTH} *.cv4.?.2 *.one2one_cv4.?.2 *.proto.semseg.2",
    "ultralytics/yolo11n-pose": f"{YOLO} *.cv4.?.2",
    "ultralytics/yolo11n-obb": f"{YOLO} *.cv4.?.2",
    "ultralytics/yolo11n-cls": "model.10.linear",
    "ultralytics/yolo26n-sem": "model.17.classifier.1 model.17.aux_head.1",
    "ultralytics/rtdetr-resnet50": (
        "*.enc_score_head *.enc_bbox_head.layers.2 *.dec_score_head.? *.dec_bbox_head.?.layers.2"
    ),
    **{f"monai/UNet-{d}d": "model.2.1.conv.unit0.conv" for d in "23"},
    **{f"monai/AttentionUnet-{d}d": "model.2.conv" for d in "23"},
    **{f"monai/BasicUNet-{d}d": "final_conv" for d in "23"},
    **{f"monai/DynUNet-{d}d": "output_block.conv.conv deep_supervision_heads.0.conv.conv" for d in "23"},
    **{f"monai/SegResNet-{d}d": "conv_final.2.conv" for d in "23"},
    **{f"monai/DenseNet121-{d}d": "class_layers.out" for d in "23"},
    **{f"monai/ResNet10-{d}d": "fc" for d in "23"},
    **{f"monai/SwinUNETR-{d}d": "out.conv.conv" for d in "23"},
    "monai/BasicUNetPlusPlus": "final_conv_0_?",
    "monai/SegResNetDS": "up_layers.?.head",
    "monai/SegResNetVAE": "conv_final.2.conv",
    "monai/UNETR-3d": "out.conv.conv",
    "monai/VNet-3d": "out_tr.conv2",
    "monai/HighResNet-3d": "blocks.4.conv",
    "monai/FlexibleUNet": "segmentation_head.0",
    "monai/EfficientNetBN-b0": "_fc",
    "monai/SENet": "last_linear",
    "monai/TorchVisionFCModel": "fc",
    "monai/MILModel": "myfc",
    "monai/ViT": "classification_head.0",
    "monai/ViTAutoEnc": "conv3d_transpose_1",
    "monai/AutoEncoder": "decode.decode_1.conv.conv",
    "monai/VarAutoEncoder": "decode.decode_1.conv.conv",
    "monai/AutoencoderKL": "decoder.blocks.11.conv",
    "monai/VQVAE": "decoder.blocks.4.conv",
    "monai/DiffusionModelUNet": "out.2.conv",
    "monai/ControlNet": "controlnet_down_blocks.* controlnet_mid_block.conv",
    "monai/SPADEDiffusionModelUNet": "out.2.conv",
    "monai/SPADEAutoencoderKL": "decoder.blocks.11.conv",
    "monai/PatchDiscriminator": "final_conv.conv",
    "monai/MultiScalePatchDiscriminator": "discriminator_?.final_conv.conv",
    "monai/Generator": "conv.layer_2.1.conv.unit1.conv",
    "monai/Discriminator": "final.1",
    "monai/Critic": "",
    "monai/Classifier": "final.1",
    "monai/Regressor": "final.1",
    "monai/MedNeXt-3d": "out_0.conv_out out_blocks.?.conv_out",
    "monai/RegUNet": "output_block.layers.0.conv",
    "monai/GlobalNet": "output_block.fc",
    "monai/LocalNet": "output_block.layers.?.conv",
    "monai/VoxelMorph": "backbone.net.1.final_conv_out.conv",
    "monai/MaskedAutoEncoderViT": "decoder_pred",
    "monai/Restormer": "output.conv",
    **{f"nnunet/{name}UNet-{d}d": "decoder.seg_layers.?" for name in ("PlainConv", "ResidualEncoder") for d in "23"},
    **{f"nnunet/ResidualUNet-{d}d": "decoder.seg_layers.?" for d in "23"},
    "nnunet/ResNet18_CIFAR": "classifier",
    "nnunet/VGG16_cifar": "classifier",
    # First named by their output layers. Amended after the sweep: models of diffusers come trained whole, so nothing in
    # them is new, but for what a ControlNet made of a UNet adds to it.
    **{f"diffusers/UNet{kind}": "" for kind in ("1DModel", "2DModel", "2DConditionModel", "3DConditionModel")},
    **{f"diffusers/Autoencoder{kind}": "" for kind in ("KL", "KLTemporalDecoder", "Tiny", "DC", "Oobleck")},
    **{f"diffusers/{name}": "" for name in ("AsymmetricAutoencoderKL", "VQModel", "T2IAdapter")},
    **{f"diffusers/{name}": "" for name in ("Transformer2DModel", "DiTTransformer2DModel")},
    "diffusers/ControlNetModel": "controlnet_down_blocks.? controlnet_mid_block",
    **{f"open_clip/{tower}": "" for tower in ("RN50", "ViT", "convnext_atto", "resnet18", "vitamin_small", "CoCa")},
    "kornia/DexiNed": (
        "up_block_1.features.2 up_block_2.features.2 up_block_3.features.5 up_block_4.features.8 "
        "up_block_5.features.11 up_block_6.features.11 block_cat.conv"
    ),
    "kornia/RRDBNet": LAST,
    "kornia/SmallSRNet": "conv4",
    "kornia/TinyViT": "head",
    "kornia/YuNet": "head.?.conv2.conv2",
    "kornia/TFeat": "descr.0",
    "kornia/OriNet": "features.19",
    "kornia/DeFMO": "rendering.net.13",
    "kornia/KeyNet": "last_conv.0",
    "kornia/XFeat": "heatmap_head.2 keypoint_head.3 fine_matcher.12",
    "kornia/DISK-Unet": "path_up.1.conv.3",
    **dict.fromkeys(
        ["kornia/VisionTransformer", "kornia/MobileViT", "kornia/EfficientViTBackbone", "kornia/HardNet"], ""
    ),
    **dict.fromkeys(["kornia/HardNet8", "kornia/HyNet", "kornia/SOSNet", "facenet/InceptionResnetV1-embedding"], ""),
    "facenet/InceptionResnetV1": "logits",
    "facenet/PNet": "conv4_?",
    "facenet/RNet": "dense5_?",
    "facenet/ONet": "dense6_?",
    "torchxrayvision/DenseNet": "classifier",
    "torchxrayvision/ResNetAE50": "conv1_1",
    "torchxrayvision/PSPNet": "classification aux_cls",
    **{f"spandrel/{name}": LAST for name in ["ATD", "DAT", "DRCT", "HAT", "RGT", "Swin2SR", "SwinIR"]},
    **{f"spandrel/{name}": UP for name in ["MoSR", "SPAN", "SeemoRe"]},
    "spandrel/Compact": "body.6",
    "spandrel/CRAFT": "upsample.0",
    "spandrel/DITN": "upsample.0",
    "spandrel/DRUNet": "m_tail",
    "spandrel/DnCNN": "model.8",
    "spandrel/ESRGAN": "model.10",
    "spandrel/FBCNN": "m_tail",
    "spandrel/FDAT": "upsampler.3",
    "spandrel/FFTformer": "output",
    "spandrel/HVICIDNet": "HVD_block0.1 ID_block0.1",
    "spandrel/KBNet_s": "ending",
    "spandrel/MixDehazeNet": "patch_unembed.proj.0",
    "spandrel/MoESR": "upscale.0",
    "spandrel/NAFNet": "ending",
    "spandrel/OmniSR": "up.0",
    "spandrel/PLKSR": "feats.3",
    "spandrel/RealPLKSR": "feats.4",
    "spandrel/RCAN": "tail.1",
    "spandrel/RealCUGAN": "unet2.conv_bottom",
    "spandrel/RetinexFormer": "body.0.denoiser.mapping",
    "spandrel/SAFMN": "to_img.0",
    "spandrel/SCUNet": "m_tail.0",
    "spandrel/SwiftSRGAN": "final_conv.pointwise",
    "spandrel/Uformer": "output_proj.proj.0",
    **{
        f"pytorchcv/{name}": PCV
        for name in ["resnet10", "preresnet10", "seresnet10", "shufflenetv2_wd2", "mobilenet_wd4"]
    },
    **{
        f"pytorchcv/{name}": PCV
        for name in ["mobilenetv2_wd4", "mnasnet_small", "menet108_8x1_g3", "igcv3_wd4", "bagnet9"]
    },
    **{f"pytorchcv/{name}": PCV for name in ["dla46c", "octresnet10_ad2", "diracnet18v2", "sqnxt23_w1", "regnetx002"]},
    **{f"pytorchcv/{name}_cifar10": PCV for name in ["resnet20", "densenet40_k12", "ror3_56", "resdropresnet20"]},
    "pytorchcv/mobilenetv3_small_w7d20": "output.conv2",
    "pytorchcv/squeezenet_v1_1": "output.final_conv",
    "pytorchcv/darknet_ref": "output.final_conv",
    "pytorchcv/ghostnet": "output.conv2",
    "pytorchcv/peleenet": "output.fc",
    "pytorchcv/hardnet39ds": "output.fc",
    "pytorchcv/condensenet74_c4_g4": "output.linear",
    "pytorchcv/nin_cifar10": "output.final_conv.conv",
    "pytorchcv/rir_cifar10": "output.final_conv.conv",
    "pytorchcv/msdnet22_cifar10": "classifiers.*.output",
    "pytorchcv/fcn8sd_resnetd50b_voc": FINAL_AND_AUX,
    "pytorchcv/deeplabv3_resnetd50b_voc": FINAL_AND_AUX,
    "pytorchcv/fastscnn_cityscapes": "head.conv3 aux_head.conv2",
    "pytorchcv/cgnet_cityscapes": "classifier",
    "pytorchcv/bisenet_resnet18_celebamaskhq": "head_*.conv2",
    "pytorchcv/erfnet_cityscapes": "head",
    "pytorchcv/enet_cityscapes": "head",
    "pytorchcv/linknet_cityscapes": "head.conv3",
    "pytorchcv/segnet_cityscapes": "head",
    "pytorchcv/unet_cityscapes": "head.conv2",
    "pytorchcv/sqnet_cityscapes": "head.deconv.conv",
    "pytorchcv/simplepose_resnet18_coco": "decoder.final_block",
    "pytorchcv/lwopenpose2d_mobilenet_cmupan_coco": "decoder.*.heatmap_bend.conv2 decoder.*.paf_bend.conv2",
    "pytorchcv/centernet_resnet18_voc": (
        "decoder.heads.heapmap_block.head.conv2 decoder.heads.wh_block.conv2 decoder.heads.reg_block.conv2"
    ),
    "pytorchcv/lffd20x5s320v2_widerface": "decoder.*.bbox_branch.conv2.conv decoder.*.score_branch.conv2.conv",
    "pytorchcv/quartznet5x5_en_ls": "output",
}
"""Layers' names, or patterns of them with a space between, by the case's name."""


def named_by_hand(name: str, model: nn.Module) -> list[str] | None:
    """The layers that the table names for a network, in the network's order; None without an entry."""
    if name not in HEADS:
        return None
    patterns = HEADS[name].split()
    layers = [found for found, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))]
    return [found for found in layers if any(fnmatch.fnmatchcase(found, pattern) for pattern in patterns)]
