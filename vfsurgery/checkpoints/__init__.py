"""Weights and networks on disk: read without running anything a file contains, written whole or not at all."""

from vfsurgery.checkpoints.files import ONNX as ONNX
from vfsurgery.checkpoints.files import PROGRAM as PROGRAM
from vfsurgery.checkpoints.files import WEIGHTS as WEIGHTS
from vfsurgery.checkpoints.files import Sink as Sink
from vfsurgery.checkpoints.files import atomic as atomic
from vfsurgery.checkpoints.files import check_writable as check_writable
from vfsurgery.checkpoints.files import file_hash as file_hash
from vfsurgery.checkpoints.files import write_text as write_text
from vfsurgery.checkpoints.fitting import check_same_classes as check_same_classes
from vfsurgery.checkpoints.fitting import load_into as load_into
from vfsurgery.checkpoints.programs import check_onnx as check_onnx
from vfsurgery.checkpoints.programs import save_onnx as save_onnx
from vfsurgery.checkpoints.programs import save_program as save_program
from vfsurgery.checkpoints.provenance import FileRecord as FileRecord
from vfsurgery.checkpoints.provenance import provenance as provenance
from vfsurgery.checkpoints.provenance import timm_config as timm_config
from vfsurgery.checkpoints.reading import EMA_WRAPPERS as EMA_WRAPPERS
from vfsurgery.checkpoints.reading import PREFIXES as PREFIXES
from vfsurgery.checkpoints.reading import WRAPPERS as WRAPPERS
from vfsurgery.checkpoints.reading import StateDict as StateDict
from vfsurgery.checkpoints.reading import load_state_dict as load_state_dict
from vfsurgery.checkpoints.reading import read_checkpoint as read_checkpoint
from vfsurgery.checkpoints.shards import INDEX as INDEX
from vfsurgery.checkpoints.writing import check_shard_size as check_shard_size
from vfsurgery.checkpoints.writing import save_sharded as save_sharded
from vfsurgery.checkpoints.writing import save_state_dict as save_state_dict
