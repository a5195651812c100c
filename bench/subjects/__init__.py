"""What can be measured: every file here is a subject and is found by being here."""

import pkgutil
from importlib import import_module

from ..subject import Subject

SUBJECTS: dict[str, Subject] = {
    subject.option: subject
    for subject in (import_module(f".{file.name}", __name__).SUBJECT for file in pkgutil.iter_modules(__path__))
}
