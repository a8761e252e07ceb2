"""Folders of networks that say what is in them, and pushing them to the Hugging Face Hub."""

from vfsurgery.hub.folders import listed as listed
from vfsurgery.hub.folders import push_to_hub as push_to_hub
from vfsurgery.hub.folders import save_folder as save_folder
