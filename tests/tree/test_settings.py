"""settings: the places whose named values a model's Python reads."""

from types import SimpleNamespace

from torch import nn

from lorafx.tree.settings import settings_of


class Base(nn.Module):
    power = 2


class Net(Base):
    scale = 3.0

    def __init__(self):
        super().__init__()
        self.config, self.inner = SimpleNamespace(depth=SimpleNamespace(n=1)), nn.Linear(2, 3)
        self.inner.config = self.config
        self.hidden = [SimpleNamespace(m=2)]


def test_places_are_modules_objects_and_their_classes():
    model = Net()
    places = {path: (holder, names) for path, holder, names in settings_of(model.named_modules())}
    assert {"", "inner", "class Net", "class Base"} < set(places)
    assert places[""][1] == ["training", "config", "hidden"], "neither parameters nor modules nor hooks"
    assert {path.rpartition(".")[2] for path in places} >= {"config", "depth"} and not any(
        "hidden" in p for p in places
    )
    assert sum(holder is model.config for holder, _ in places.values()) == 1, "once, though two modules have it"
    assert places["class Net"][1] == ["scale"] and places["class Base"][1] == ["power"]
    assert not any("Linear" in path for path in places), "a library's classes stay what they are"


def test_classes_of_one_name_are_two_places():
    def local():
        class Layer(nn.Module):
            pass

        return Layer()

    model = nn.Sequential(local(), local())
    classes = [path for path, holder, _ in settings_of(model.named_modules()) if isinstance(holder, type)]
    assert len(set(classes)) == 2 and all(path.startswith("class Layer") for path in classes)
