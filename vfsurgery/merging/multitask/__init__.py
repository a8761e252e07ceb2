"""Experts for different tasks as one network: a trunk for all, and the head of each."""

from vfsurgery.merging.multitask.files import load_multitask as load_multitask
from vfsurgery.merging.multitask.files import save_multitask as save_multitask
from vfsurgery.merging.multitask.joined import Concat as Concat
from vfsurgery.merging.multitask.joined import Multitask as Multitask
from vfsurgery.merging.multitask.learned import AdaMerging as AdaMerging
from vfsurgery.merging.multitask.multitask import multitask as multitask
from vfsurgery.merging.multitask.report import MultitaskReport as MultitaskReport
from vfsurgery.merging.multitask.unions import union_model as union_model
