#!/usr/bin/env bash
# torch 2.14.1: fx.GraphModule(root, graph) makes itself the owner of the graph that it is given. What is recorded into
# the graph afterwards is looked up in the new graph module, which has copies of what root had at that time.
#
# One would guess: a GraphModule around a graph is a view of it, made to run it once and be forgotten; the module that
# the graph belonged to goes on owning it.
# Seen: a layer that is added to the first module later cannot be called in the graph any more: graph.call_module raises
# an AttributeError that speaks of the nn.Module, though a missing module is otherwise only warned of.
# Way out: fx.Interpreter(module, graph=graph) runs a graph and leaves its owner alone; or copy the graph first.
#
# Exits 0 as long as torch does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import warnings

import torch
from torch import fx, nn

warnings.simplefilter("ignore")


def add_a_layer(look):
    """Trace, look at the graph in some way, then add a layer behind it; says what came of it."""
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    graph = module.graph
    look(module, graph)
    module.add_submodule("extra", nn.ReLU())
    output = next(node for node in graph.nodes if node.op == "output")
    try:
        with graph.inserting_before(output):
            graph.call_module("extra", (output.args[0],))
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "works"


x = torch.ones(1, 2)
kept = []
found = {
    "nothing": add_a_layer(lambda module, graph: None),
    "Interpreter": add_a_layer(lambda module, graph: fx.Interpreter(module, graph=graph).run(x)),
    "GraphModule": add_a_layer(lambda module, graph: kept.append(fx.GraphModule(module, graph))),
}
print("torch", torch.__version__)
for look, result in found.items():
    print(f"  after {look}: {result}")
assert found["nothing"] == found["Interpreter"] == "works"
assert found["GraphModule"].startswith("AttributeError"), "a graph module leaves the graph to its owner now"
PYTHON
