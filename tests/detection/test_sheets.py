"""Tables of times, as people and programs write them: read as meant, or refused with row and column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorkeep.detection.data.annotations import read_annotations
from tensorkeep.detection.data.sheet_columns import meaning
from tensorkeep.detection.data.sheets import read_sheet
from tensorkeep.errors import TensorkeepError

PLAIN = [("a", 4.5, 9.25, "pour"), ("b", 64.5, 70.0, "stir")]


def rows_of(text: str | bytes, folder: Path, name: str = "t.csv", **how: object) -> list[tuple[str, float, float, str]]:
    """The actions of a table that holds this text."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(a.video, round(a.start, 6), round(a.end, 6), a.label) for a in read_sheet(path, **how).actions]  # type: ignore[arg-type]


ALIKE = {
    "plain": "video,start,end,label\na,4.5,9.25,pour\nb,64.5,70,stir\n",
    "hyphens": "file,t-start,t-end,label,who\na,4.5,9.25,pour,me\nb,64.5,70,stir,me\n",
    "other order": "action;End Time (s);Start Time (s);Video ID\npour;9,25;4,5;a\nstir;70;64,5;b\n",
    "clocks": "video\tstart\tend\tlabel\na\t0:04.5\t0:09.25\tpour\nb\t1:04.5\t01:10\tstir\n",
    "hours, German": "video;begin;stop;class\r\na;0:00:04,5;0:00:09,25;pour\r\nb;0:01:04,5;0:01:10,0;stir\r\n",
    "Excel": "\ufeffsep=;\r\nVideo;Start;End;Activity\r\na;4,5;9,25;pour\r\nb;64,5;70;stir\r\n;;;\r\n",
    "milliseconds": "video,start_ms,end_ms,label\na,4500,9250,pour\nb,64500,70000,stir\n",
    "minutes": "video,start (min),end (min),label\na,0.075,0.1541666667,pour\nb,1.075,1.1666666667,stir\n",
    "frames and rate": "video,start_frame,end_frame,fps,label\na,18,37,4,pour\nb,258,280,4,stir\n",
    "both units": "video,start_frame,end_frame,start_sec,end_sec,label\na,9,9,4.5,9.25,pour\nb,9,9,64.5,70,stir\n",
    "segments": 'video,label,segment\na,pour,"[4.5, 9.25]"\nb,stir,"64.5 - 70"\n',
    "durations": "video,start,duration,label\na,4.5,4.75,pour\nb,64.5,5.5,stir\n",
    "a title above": "Kitchen study,,,\n,,,\nvideo,onset,offset,behaviour\na,4.5,9.25,pour\nb,64.5,70,stir\n",
    "Chinese": "视频,开始,结束,动作\na,4.5,9.25,pour\nb,64.5,70,stir\n",
    "quoted commas": 'video,start,end,label\na,"4,5","9,25",pour\nb,"64,5",70,stir\n',
    "ELAN": "Tier\tBegin Time - hh:mm:ss.ms\tBegin Time - ss.msec\tBegin Time - msec\tEnd Time - hh:mm:ss.ms\t"
    "End Time - ss.msec\tEnd Time - msec\tDuration - hh:mm:ss.ms\tDuration - ss.msec\tDuration - msec\tAnnotation\t"
    "File Name\nx\t00:00:04.500\t4.5\t4500\t00:00:09.250\t9.25\t9250\t00:00:04.750\t4.75\t4750\tpour\ta\n"
    "x\t00:01:04.500\t64.5\t64500\t00:01:10.000\t70.0\t70000\t00:00:05.500\t5.5\t5500\tstir\tb\n",
    "BORIS, aggregated": "Observation id,Observation date,Media file name,Media duration (s),FPS (frame/s),Subject,"
    "Behavior,Behavioral category,Behavior type,Start (s),Stop (s),Duration (s),Comment start,Comment stop\n"
    "o1,2024,a,100,25,s,pour,,STATE,4.5,9.25,4.75,,\no2,2024,b,100,25,s,stir,,STATE,64.5,70,5.5,,\n"
    "o2,2024,b,100,25,s,wave,,POINT,80,80,NA,,\n",
    "BORIS, events": "Observation id\tMedia file name\tSubject\tBehavior\tBehavior type\tTime\n"
    "o\ta\ts\tpour\tSTART\t4.5\no\ta\tt\twave\tPOINT\t5\no\ta\ts\tpour\tSTOP\t9.25\no\tb\ts\tstir\tSTART\t64.5\no\tb\ts\tstir\tSTOP\t70\n",
    "VIA 3": '# Exported using VGG Image Annotator\n# ATTRIBUTE = {"1":{"aname":"act","options":{"0":"pour"}}}\n'
    "# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata\n"
    '"1_x","[""a""]",0,"[4.5,9.25]","[]","{""1"":""0""}"\n"1_z","[""a""]",0,"[5]","[2,1,1,9,9]","{""1"":""0""}"\n'
    '"2_y","[""b""]",0,"[64.5,70]","[]","{""1"":""stir""}"\n',
}


@pytest.mark.parametrize("text", ALIKE.values(), ids=ALIKE)
def test_tables_that_say_the_same_are_read_alike(text: str, tmp_path: Path) -> None:
    assert rows_of(text, tmp_path) == PLAIN


def test_tables_in_utf_16_and_with_given_columns_are_read(tmp_path: Path) -> None:
    assert rows_of(ALIKE["clocks"].encode("utf-16"), tmp_path) == PLAIN
    german = "Datei;von;bis;Handlung\na;4,5;9,25;pour\nb;64,5;70;stir\n"
    with pytest.raises(TensorkeepError, match="none of its first rows"):
        rows_of(german, tmp_path)
    names = {"video": "Datei", "start": "von", "end": "bis", "label": "Handlung"}
    assert rows_of(german, tmp_path, columns=names) == PLAIN


def test_exports_in_json_and_audacity_labels_are_read(tmp_path: Path) -> None:
    assert rows_of("4.500000\t9.250000\tpour\n64.5\t70.0\tstir\n", tmp_path, "a.txt") == [
        ("a", 4.5, 9.25, "pour"),
        ("a", 64.5, 70.0, "stir"),
    ]
    via = {
        "project": {},
        "attribute": {"1": {"options": {"0": "pour"}}},
        "file": {"1": {"fname": "a"}, "2": {"fname": "b"}},
        "view": {"1": {"fid_list": ["1"]}, "2": {"fid_list": ["2"]}},
        "metadata": {
            "1_x": {"vid": "1", "z": [4.5, 9.25], "xy": [], "av": {"1": "0"}},
            "2_y": {"vid": "2", "z": [64.5, 70], "xy": [], "av": {"1": "stir"}},
        },
    }
    assert rows_of(json.dumps(via), tmp_path, "via.json") == PLAIN
    ranges = {"ranges": [{"start": 11, "end": 20}], "timelinelabels": ["pour"]}
    task = {"data": {"video": "/data/upload/1/0123abcd-a.mp4"}, "annotations": [{"result": [{"value": ranges}]}]}
    sheet_path = tmp_path / "ls.json"
    sheet_path.write_text(json.dumps([task]))
    [action] = read_sheet(sheet_path).actions
    assert (action.start, action.end, action.frames) == (10, 20, True)  # frames count from 1, the last one included
    with pytest.raises(TensorkeepError, match="frames"):
        read_annotations(sheet_path)
    task["annotations"].append({"result": []})
    sheet_path.write_text(json.dumps([task]))
    with pytest.raises(TensorkeepError, match="2 annotations"):
        read_annotations(sheet_path)


WRONG = {
    "no label": ("video,start,end\na,1,2\n", "the label"),
    "an empty video": ("video,start,end,label\na,1,2,x\n,3,4,x\n", r"row 3: column 'video'"),
    "an empty end": ("video,start,end,label\na,1,,x\n", r"row 2: column 'end': is empty"),
    "a word": ("video,start,end,label\na,1,soon,x\n", r"row 2: column 'end': 'soon'"),
    "swapped": ("video,start,end,label\na,1,2,x\na,5,4,x\n", "row 3: it ends at 4, before"),
    "negative": ("video,start,end,label\na,-1,2,x\n", "row 2: column 'start': '-1' is negative"),
    "a row without a label": ("video,start,end,label\na,1,2,\n", "row 2: it has no label"),
    "comma and point": ("video;start;end;label\na;1,5;2.5;x\n", "which is before the decimals"),
    "thousands or decimals": ('video,start,end,label\na,"1,000","2,000",x\n', "thousands"),
    "commas unquoted": ("video,start,end,label\na,1,5,2,5,x\n", "row 2 has more cells"),
    "a time code": ("video,start,end,label\na,00:00:01:12,00:00:02:00,x\n", "time code"),
    "a time of day": ("video,start,end,label\na,1:05 AM,1:06 AM,x\n", "time of day"),
    "75 seconds": ("video,start,end,label\na,0:75,2:10,x\n", "no time: there are 60"),
    "a clock in frames": ("video,start_frame,end_frame,label\na,0:01,0:02,x\n", "is a clock, and the unit is frames"),
    "half a frame": ("video,start_frame,end_frame,fps,label\na,1.5,4,25,x\n", "no whole frame"),
    "units that differ": ("video,start_sec,end_frame,label\na,1,4,x\n", "different units: frames and seconds"),
    "two labels": ("video,start,end,label,class\na,1,4,x,y\n", "'label' and 'class' could both be the label"),
    "two subsets": ("video,start,end,label,split\na,1,4,x,train\na,5,6,x,val\n", "row 3: 'a' is in 'val'"),
    "not ended": ("Media file name,Behavior,Status,Time\na,x,START,1\n", "row 2: 'x' starts here"),
    "no header": ("a.mp4,1,2,x\nb.mp4,3,4,y\n", "none of its first rows names"),
    "no row": ("video,start,end,label\n", "no action"),
    "latin-1": ("video,start,end,label\na,1,2,ôter\n".encode("latin-1"), "UTF-8"),
    "zeros": (b"video,start\0,end", "NUL bytes"),
}


@pytest.mark.parametrize("text, why", WRONG.values(), ids=WRONG)
def test_what_is_not_understood_is_one_error_with_its_place(text: str | bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(TensorkeepError, match=why) as caught:
        rows_of(text, tmp_path)
    assert "t.csv" in str(caught.value) or "t:" in str(caught.value)


@pytest.mark.parametrize("name", ["times.xlsx", "times.ods", "a.eaf"])
def test_other_programs_own_files_are_refused_with_what_to_save(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(TensorkeepError, match="own file") as caught:
        read_annotations(tmp_path / name)
    assert "CSV" in str(caught.value) or "Tab-delimited" in str(caught.value)


def test_what_was_read_how_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("video,start,end,label,mood\na,1,2,Pour\na,3,4,pour\na,5,5,pour\nb,,,\n")
    sheet = read_sheet(path)
    said = "\n".join(sheet.notes)
    assert "read as seconds" in said and "not read: mood" in said and "'Pour' and 'pour' are 2 classes" in said
    assert "1 rows have no length" in said and sheet.empty == ("b",)
    assert "read as seconds" not in "\n".join(read_sheet(path, unit="seconds").notes)


def test_a_table_is_annotations_for_recipes_and_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("file,start,end,label,split,video_duration\nC:\\v\\a.MP4,1,2,x,train,9\nb.mkv,3,4,y,val,8\n")
    got = read_annotations(path)
    assert (got.layout, got.classes, got.subsets()) == ("table", ("x", "y"), ("train", "val"))
    assert (got.videos["a"].duration, got.videos["b"].segments.tolist()) == (9.0, [[3.0, 4.0]])
    path.write_text("file,start,end,label\na.mp4,1,2,x\n")
    assert read_annotations(path).subsets() == ("all",)
    path.write_text("file,start,end,label\n/x/a.mp4,1,2,x\n/y/a.mp4,1,2,x\n")
    with pytest.raises(TensorkeepError, match="would both be the video"):
        read_annotations(path)


def test_names_of_columns_that_say_something_else_are_not_times() -> None:
    for name in ("label_id", "Comment start", "Image index stop", "Observation duration", "verb_class", ""):
        assert meaning(name) == ("", ""), name
