"""Writes what saefw knows of timm's models without importing timm, from the timm that is installed; takes a minute.

python scripts/timm_facts.py > plugins/models/saefw_timm/models.txt
"""

from saefw.plugin import mend_torchvision


def main() -> None:
    """Print the version, then a line a model: every plain stack of ViT blocks, with each tag of its weights."""
    mend_torchvision()
    import timm
    from timm.models import get_arch_pretrained_cfgs

    import saefw_timm

    print("timm", timm.__version__)
    for arch in saefw_timm.architectures():
        first = saefw_timm.stack(arch)
        others = [saefw_timm.stack(name) for name in get_arch_pretrained_cfgs(arch) if name != first.name]
        print(*[first, *others], sep="\n")


if __name__ == "__main__":
    main()
