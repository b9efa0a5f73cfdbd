"""Writes small data sets in the formats of the real ones, with pictures of the shapes world."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hones_lens.data import shapes
from hones_lens.data.drawing import text_box

N_SCENES = 40


@dataclass
class WrittenDataset:
    """A data set on the disk: what `load_examples` takes, and which tasks it serves."""

    dataset: str
    data_file: Path | None
    image_dir: Path | None
    tasks: tuple[str, ...]
    n_records: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path | None]:
        return {"data_file": self.data_file, "image_dir": self.image_dir}


def sample_scenes(count: int = N_SCENES) -> list[shapes.Scene]:
    return list(itertools.islice(shapes.scenes("test", 21), count))


def ten_answers(answer: str) -> list[str]:
    return [answer] * 8 + ["something", "something else"]


def box(scene: shapes.Scene) -> list[float]:
    left, top, right, bottom = text_box(scene)
    return [float(left), float(top), float(right - left), float(bottom - top)]


def coco_name(number: int, subset: str = "val2014") -> str:
    return f"COCO_{subset}_{number:012d}.jpg"


def save(scenes: Sequence[shapes.Scene], folder: Path, name: Callable[[int], str]) -> Path:
    """Save each scene under its name, a JPEG."""
    for i, scene in enumerate(scenes):
        file = folder / name(100 + i)
        file.parent.mkdir(parents=True, exist_ok=True)
        scene.load().save(file, quality=95)
    return folder


def write(file: Path, data: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


def unified_record(i: int, scene: shapes.Scene) -> dict[str, Any]:
    number, question = 100 + i, shapes.questions(scene)[-1]
    captions = [{"caption_id": 10 * number + k, "caption": c} for k, c in enumerate(scene.captions)]
    return {
        "image_id": number,
        "image_info": {"file_name": coco_name(number), "width": scene.size[0], "height": scene.size[1]},
        "vqa": {
            "question_id": 1000 * number,
            "question": question.text,
            "answer": question.answer,
            "all_answers": ten_answers(question.answer),
            "answer_type": "other",
        },
        "captions": captions,
        "ocr": {
            "ocr_id": 5000 + i,
            "bbox": box(scene),
            "text": scene.word,
            "legibility": "legible",
            "language": "english",
            "class": "machine printed",
        },
        "retrieval": captions,
    }


def hones(folder: Path, name: str = "hones") -> WrittenDataset:
    scenes = sample_scenes()
    file = write(folder / "unified.json", {"data": [unified_record(i, s) for i, s in enumerate(scenes)]})
    images = save(scenes, folder / "images", coco_name)
    tasks = ("vqa", "ocr", "caption", "retrieval")
    return WrittenDataset(name, file, images, tasks, dict.fromkeys(tasks, N_SCENES))


def hones_path(folder: Path) -> WrittenDataset:
    written = hones(folder)
    return WrittenDataset(str(written.data_file), None, written.image_dir, written.tasks, written.n_records)


def coco_unified(folder: Path) -> WrittenDataset:
    return hones(folder, "coco")


def karpathy_image(i: int, scene: shapes.Scene, filename: str) -> dict[str, Any]:
    sentences = [{"raw": c, "tokens": c.split(), "imgid": i, "sentid": 2 * i} for c in scene.captions]
    return {"filename": filename, "imgid": i, "split": "val", "sentences": sentences, "sentids": [2 * i]}


def coco_karpathy(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    images = [
        {**karpathy_image(i, s, coco_name(100 + i)), "filepath": "val2014", "cocoid": 100 + i}
        for i, s in enumerate(scenes)
    ]
    file = write(folder / "dataset_coco.json", {"dataset": "coco", "images": images})
    save(scenes, folder / "images", lambda n: f"val2014/{coco_name(n)}")
    tasks = ("caption", "retrieval")
    return WrittenDataset("coco", file, folder / "images", tasks, dict.fromkeys(tasks, N_SCENES))


def coco_official(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    images = [
        {
            "id": 100 + i,
            "file_name": coco_name(100 + i),
            "width": s.size[0],
            "height": s.size[1],
            "license": 1,
        }
        for i, s in enumerate(scenes)
    ]
    annotations = [
        {"image_id": 100 + i, "id": 10 * i + k, "caption": caption}
        for i, s in enumerate(scenes)
        for k, caption in enumerate(s.captions)
    ]
    data = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    file = write(folder / "captions_val2014.json", data)
    tasks = ("caption", "retrieval")
    pictures = save(scenes, folder / "images", lambda n: f"{n:012d}.jpg")  # named as in 2017
    return WrittenDataset("coco", file, pictures, tasks, dict.fromkeys(tasks, N_SCENES))


def vqav2(folder: Path) -> WrittenDataset:
    scenes, questions, annotations = sample_scenes(), [], []
    for i, scene in enumerate(scenes):
        for k, question in enumerate(shapes.questions(scene)[:2]):
            ids = {"image_id": 100 + i, "question_id": 1000 * (100 + i) + k}
            answers = [
                {"answer": a, "answer_confidence": "yes", "answer_id": n}
                for n, a in enumerate(ten_answers(question.answer), start=1)
            ]
            kind = {"question_type": "how many", "answer_type": "number"}
            questions.append({**ids, "question": question.text})
            annotations.append({**ids, **kind, "multiple_choice_answer": question.answer, "answers": answers})
    header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    write(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**header, "task_type": "Open-Ended", "questions": questions},
    )
    data = {**header, "annotations": annotations}
    file = write(folder / "v2_mscoco_val2014_annotations.json", data)
    images = save(scenes, folder / "images", coco_name)
    return WrittenDataset("vqav2", file, images, ("vqa",), {"vqa": 2 * N_SCENES})


def cocotext(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    images = {
        str(100 + i): {
            "id": 100 + i,
            "set": "train",
            "width": s.size[0],
            "height": s.size[1],
            "file_name": coco_name(100 + i, "train2014"),
        }
        for i, s in enumerate(scenes)
    }
    annotations = {}
    for i, scene in enumerate(scenes):
        common = {
            "image_id": 100 + i,
            "bbox": box(scene),
            "area": 1.0,
            "mask": [],
            "class": "machine printed",
        }
        text = {"utf8_string": scene.word, "legibility": "legible", "language": "english"}
        annotations[str(5000 + i)] = {**common, "id": 5000 + i, **text}
        blurred = {"utf8_string": "", "legibility": "illegible", "language": "na"}
        annotations[str(6000 + i)] = {**common, "id": 6000 + i, **blurred}
    by_image = {str(100 + i): [5000 + i, 6000 + i] for i in range(len(scenes))}
    data = {"cats": {}, "anns": annotations, "imgs": images, "imgToAnns": by_image, "info": {}}
    file = write(folder / "cocotext.v2.json", data)
    pictures = save(scenes, folder / "images", lambda n: coco_name(n, "train2014"))
    return WrittenDataset("cocotext", file, pictures, ("ocr",), {"ocr": N_SCENES})


def gqa_questions(scenes: Sequence[shapes.Scene]) -> dict[str, dict[str, Any]]:
    return {
        f"20{100 + i}{k}": {
            "imageId": f"n{100 + i}",
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": f"It is {question.answer}.",
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "attr", "detailed": "color"},
            "groups": {"global": None, "local": "10c-shape_color"},
            "entailed": [],
            "equivalent": [],
            "semantic": [],
            "semanticStr": "",
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        }
        for i, scene in enumerate(scenes)
        for k, question in enumerate(shapes.questions(scene)[:2])
    }


def gqa(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    file = write(folder / "testdev_balanced_questions.json", gqa_questions(scenes))
    images = save(scenes, folder / "images", lambda n: f"n{n}.jpg")
    return WrittenDataset("gqa", file, images, ("vqa",), {"vqa": 2 * N_SCENES})


def gqa_list(folder: Path) -> WrittenDataset:
    written = gqa(folder)
    questions = gqa_questions(sample_scenes())
    write(folder / "list.json", [{"question_id": key, **question} for key, question in questions.items()])
    return WrittenDataset("gqa", folder / "list.json", written.image_dir, ("vqa",), written.n_records)


def textvqa(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    data = [
        {
            "question_id": 34602 + i,
            "image_id": f"{100 + i:016x}",
            "question": "what is the word?",
            "question_tokens": ["what", "is", "the", "word"],
            "answers": [scene.word] * 9 + [""],
            "image_width": scene.size[0],
            "image_height": scene.size[1],
            "image_classes": ["Poster"],
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "set_name": "val",
        }
        for i, scene in enumerate(scenes)
    ]
    header = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    file = write(folder / "TextVQA_0.5.1_val.json", {**header, "data": data})
    images = save(scenes, folder / "images", lambda n: f"{n:016x}.jpg")
    return WrittenDataset("textvqa", file, images, ("vqa",), {"vqa": N_SCENES})


def flickr30k_csv(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    rows = [
        [json.dumps(s.captions), json.dumps([2 * i, 2 * i + 1]), "test", f"{100 + i}.jpg", i]
        for i, s in enumerate(scenes)
    ]
    file = write_csv(
        folder / "flickr_annotations_30k.csv", ["raw", "sentids", "split", "filename", "img_id"], rows
    )
    images = save(scenes, folder / "flickr30k-images", lambda n: f"{n}.jpg")
    tasks = ("caption", "retrieval")
    return WrittenDataset("flickr30k", file, images, tasks, dict.fromkeys(tasks, N_SCENES))


def flickr30k_json(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    images = [karpathy_image(i, s, f"{100 + i}.jpg") for i, s in enumerate(scenes)]
    file = write(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
    pictures = save(scenes, folder / "flickr30k-images", lambda n: f"{n}.jpg")
    tasks = ("caption", "retrieval")
    return WrittenDataset("flickr30k", file, pictures, tasks, dict.fromkeys(tasks, N_SCENES))


def vizwiz(folder: Path) -> WrittenDataset:
    scenes, data = sample_scenes(), []
    for i, scene in enumerate(scenes):
        question = shapes.questions(scene)[-1]
        answers = [{"answer": a, "answer_confidence": "yes"} for a in ten_answers(question.answer)]
        image = f"VizWiz_val_{100 + i:08d}.jpg"
        types = {"answer_type": "other", "answerable": 1}
        data.append({"image": image, "question": question.text, "answers": answers, **types})
    images = save(scenes, folder / "images", lambda n: f"val/VizWiz_val_{n:08d}.jpg")
    return WrittenDataset("vizwiz", write(folder / "val.json", data), images, ("vqa",), {"vqa": N_SCENES})


def docvqa(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    data = [
        {
            "questionId": 49153 + i,
            "question": "What is the word?",
            "question_types": ["layout", "form"],
            "image": f"documents/pybv0228_{100 + i}.png",
            "docId": 14465,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": str(100 + i),
            "answers": [scene.word, f"{scene.word}."],
            "data_split": "val",
        }
        for i, scene in enumerate(scenes)
    ]
    header = {"dataset_name": "docvqa", "dataset_split": "val", "dataset_version": "1.0"}
    file = write(folder / "val_v1.0_withQT.json", {**header, "data": data})
    images = save(scenes, folder / "val", lambda n: f"documents/pybv0228_{n}.png")
    return WrittenDataset("docvqa", file, images, ("vqa-anls",), {"vqa-anls": N_SCENES})


def pope(folder: Path) -> WrittenDataset:
    """Two questions a picture, one with the answer yes and one with no."""
    scenes, lines = sample_scenes(), []
    for i, scene in enumerate(scenes):
        things = {"yes": scene.things[0].shape, "no": "zebra"}
        for label, thing in things.items():
            question = {"question_id": len(lines), "image": coco_name(100 + i), "image_id": 100 + i}
            text = f"Is there a {thing} in the image?"
            lines.append(json.dumps({**question, "text": text, "label": label}))
    images = save(scenes, folder / "val2014", coco_name)
    file = folder / "coco_pope_random.json"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tasks = ("yes-no", "vqa")
    return WrittenDataset("pope", file, images, tasks, dict.fromkeys(tasks, 2 * N_SCENES))


def _caption_lines(scenes: Sequence[shapes.Scene], line: str) -> list[str]:
    return [
        line.format(image=f"{100 + i}.jpg", number=k, caption=caption)
        for i, scene in enumerate(scenes)
        for k, caption in enumerate(scene.captions)
    ]


def flickr30k_token(folder: Path) -> WrittenDataset:
    """`results_20130124.token`, as the authors publish it."""
    return _flickr30k_lines(folder, "results_20130124.token", [], "{image}#{number}\t{caption}")


def flickr30k_kaggle(folder: Path) -> WrittenDataset:
    """`results.csv`, as Kaggle's copy has it."""
    header = "image_name| comment_number| comment"
    return _flickr30k_lines(folder, "results.csv", [header], "{image}| {number}| {caption}")


def _flickr30k_lines(folder: Path, name: str, header: list[str], line: str) -> WrittenDataset:
    scenes = sample_scenes()
    images = save(scenes, folder / "flickr30k-images", lambda n: f"{n}.jpg")
    file = folder / name
    file.write_text("\n".join([*header, *_caption_lines(scenes, line)]) + "\n", encoding="utf-8")
    tasks = ("caption", "retrieval")
    return WrittenDataset("flickr30k", file, images, tasks, dict.fromkeys(tasks, N_SCENES))


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])
    return file


def own_rows(scenes: Sequence[shapes.Scene]) -> list[dict[str, Any]]:
    rows = []
    for i, scene in enumerate(scenes):
        question = shapes.questions(scene)[-1]
        rows.append(
            {
                "id": f"r{i}",
                "image": f"pictures/{100 + i}.jpg",
                "question": question.text,
                "answers": [question.answer, f"a {question.answer}"],
                "text": scene.word,
                "bbox": box(scene),
                "references": list(scene.captions),
            }
        )
    return rows


def own_csv(folder: Path) -> WrittenDataset:
    """A folder that holds everything."""
    scenes = sample_scenes()
    rows = own_rows(scenes)
    cells = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
    write_csv(folder / "records.csv", list(rows[0]), cells)
    save(scenes, folder, lambda n: f"pictures/{n}.jpg")
    tasks = ("vqa", "ocr", "caption", "retrieval")
    return WrittenDataset(str(folder), None, None, tasks, dict.fromkeys(tasks, N_SCENES))


def own_jsonl(folder: Path) -> WrittenDataset:
    scenes = sample_scenes()
    file = folder / "records.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, own_rows(scenes))) + "\n", encoding="utf-8")
    save(scenes, folder / "images", lambda n: f"pictures/{n}.jpg")
    tasks = ("vqa", "ocr", "caption", "retrieval")
    return WrittenDataset(str(file), None, folder / "images", tasks, dict.fromkeys(tasks, N_SCENES))


FORMATS: dict[str, Callable[[Path], WrittenDataset]] = {
    f.__name__: f
    for f in (
        hones,
        hones_path,
        coco_unified,
        coco_karpathy,
        coco_official,
        vqav2,
        cocotext,
        gqa,
        gqa_list,
        textvqa,
        flickr30k_csv,
        flickr30k_json,
        flickr30k_token,
        flickr30k_kaggle,
        vizwiz,
        docvqa,
        pope,
        own_csv,
        own_jsonl,
    )
}
TASKS_BY_FORMAT = {
    "hones": ("vqa", "ocr", "caption", "retrieval"),
    "hones_path": ("vqa", "ocr", "caption", "retrieval"),
    "coco_unified": ("vqa", "ocr", "caption", "retrieval"),
    "coco_karpathy": ("caption", "retrieval"),
    "coco_official": ("caption", "retrieval"),
    "vqav2": ("vqa",),
    "cocotext": ("ocr",),
    "gqa": ("vqa",),
    "gqa_list": ("vqa",),
    "textvqa": ("vqa",),
    "flickr30k_csv": ("caption", "retrieval"),
    "flickr30k_json": ("caption", "retrieval"),
    "flickr30k_token": ("caption", "retrieval"),
    "flickr30k_kaggle": ("caption", "retrieval"),
    "vizwiz": ("vqa",),
    "docvqa": ("vqa-anls",),
    "pope": ("yes-no", "vqa"),
    "own_csv": ("vqa", "ocr", "caption", "retrieval"),
    "own_jsonl": ("vqa", "ocr", "caption", "retrieval"),
}
