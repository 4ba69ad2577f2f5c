"""The papers behind each loss and advantage: what a model card names and cites."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    name: str  # of the method
    arxiv: str
    bibtex: str

    @property
    def link(self) -> str:
        return f"[{self.name}](https://huggingface.co/papers/{self.arxiv})"


RLOO = Paper(
    "RLOO",
    "2402.14740",
    r"""@inproceedings{ahmadian2024back,
  title     = {Back to Basics: Revisiting {REINFORCE}-Style Optimization for Learning from Human Feedback in {LLM}s},
  author    = {Ahmadian, Arash and Cremer, Chris and Gall{\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and Pietquin, Olivier and {\"U}st{\"u}n, Ahmet and Hooker, Sara},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics (Volume 1: Long Papers)},
  year      = {2024},
  pages     = {12248--12267},
  publisher = {Association for Computational Linguistics},
  note      = {arXiv:2402.14740}
}""",  # noqa: E501
)
GRPO = Paper(
    "GRPO",
    "2402.03300",
    """@misc{shao2024deepseekmath,
  title  = {{DeepSeekMath}: Pushing the Limits of Mathematical Reasoning in Open Language Models},
  author = {Shao, Zhihong and others},
  year   = {2024},
  note   = {arXiv:2402.03300}
}""",
)
DAPO = Paper(
    "DAPO",
    "2503.14476",
    """@misc{yu2025dapo,
  title  = {{DAPO}: An Open-Source {LLM} Reinforcement Learning System at Scale},
  author = {Yu, Qiying and others},
  year   = {2025},
  note   = {arXiv:2503.14476}
}""",
)
DR_GRPO = Paper(
    "Dr. GRPO",
    "2503.20783",
    """@misc{liu2025understanding,
  title  = {Understanding {R1-Zero}-Like Training: A Critical Perspective},
  author = {Liu, Zichen and Chen, Changyu and Li, Wenjun and Qi, Penghui and Pang, Tianyu and Du, Chao and Lee, Wee Sun and Lin, Min},
  year   = {2025},
  note   = {arXiv:2503.20783}
}""",  # noqa: E501
)
REINFORCE_PP = Paper(
    "REINFORCE++",
    "2501.03262",
    """@misc{hu2025reinforcepp,
  title  = {{REINFORCE++}: A Simple and Efficient Approach for Aligning Large Language Models},
  author = {Hu, Jian},
  year   = {2025},
  note   = {arXiv:2501.03262}
}""",
)
