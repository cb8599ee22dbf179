import re
from pathlib import Path

import pytest

from batchjob.data.reading import ReadFailure
from batchjob.data.sources import index_images
from batchjob.errors import UserError
from tests.image_files import PNG, write


def write_list(folder: Path, name: str, text: str, encoding: str = "utf-8") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


def test_lists_give_paths_as_they_are_written_below_the_list_s_folder(tmp_path):
    write(tmp_path / "a b.png")
    (tmp_path / "list.txt").write_text(f"a b.png\n\n{tmp_path / 'a b.png'}\r\nnone.png\n")
    index = index_images(str(tmp_path / "list.txt"))
    assert index.ids() == ["a b.png", str(tmp_path / "a b.png"), "none.png"]
    assert index.read(0) == index.read(1) == PNG
    with pytest.raises(ReadFailure) as failure:
        index.read(2)
    assert failure.value.cause == "missing"


def test_a_csv_gives_the_paths_of_its_column_and_ids_where_it_has_them(tmp_path):
    (tmp_path / "list.csv").write_text('Image_ID,file_name\n7,"a, b.png"\n8,"new\nline.png"\n')
    write(tmp_path / "a, b.png")
    write(tmp_path / "new\nline.png")
    index = index_images(str(tmp_path / "list.csv"))
    assert index.ids() == ["7", "8"]
    assert index.read(0) == index.read(1) == PNG


def test_a_list_that_is_not_utf_8_text_is_one_line_with_the_place(tmp_path: Path) -> None:
    for name, encoding in (("utf16.txt", "utf-16"), ("utf16.csv", "utf-16-le")):
        with pytest.raises(UserError, match=r"line 1 of .* holds NUL: it is not UTF-8 text"):
            index_images(write_list(tmp_path, name, "path\nimgs/0.jpg\n", encoding))
    with pytest.raises(UserError, match=r"line 3 of .*nul.csv' holds NUL"):
        index_images(write_list(tmp_path, "nul.csv", "path\na.jpg\nb\0.jpg\n"))


def test_long_fields_beside_the_path_are_ignored(tmp_path: Path) -> None:
    rows = 'path,rle\na.jpg,"' + "1 2 " * 22000 + '"\nb.jpg,"' + "1 2 " * 34000 + '"\n'
    assert index_images(write_list(tmp_path, "big.csv", rows)).ids() == ["a.jpg", "b.jpg"]


def test_a_quote_that_is_left_open_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = 'path,note\nimgs/0.jpg,"5 inch\nimgs/1.jpg,x\nimgs/2.jpg,y\n'
    with pytest.raises(UserError, match=r"line 2 of .*unclosed.csv' opens a quote that nothing closes"):
        index_images(write_list(tmp_path, "unclosed.csv", rows))
    with pytest.raises(UserError, match=r"line 2 of .*amid.csv' is not CSV"):
        index_images(write_list(tmp_path, "amid.csv", 'path,note\na.jpg,"5" inch\n'))


@pytest.mark.parametrize(
    ("name", "sign", "kind"), [("l.csv", ";", "commas"), ("l.csv", "\t", "commas"), ("l.tsv", ",", "tabs")]
)
def test_another_sign_between_the_columns_is_named_with_the_one_to_use(
    tmp_path: Path, name: str, sign: str, kind: str
) -> None:
    path = tmp_path / name
    path.write_text(f"path{sign}label\na.jpg{sign}1\n")
    with pytest.raises(UserError, match=f"{re.escape(repr(sign))} between its columns; save it with {kind}"):
        index_images(str(path))


def test_a_path_that_a_list_names_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imgs/0.jpg is named twice \(1 such pairs\), in rows 1 and 3 of the data"):
        index_images(write_list(tmp_path, "twice.csv", "path,label\nimgs/0.jpg,1\nimgs/1.jpg,1\nimgs/0.jpg,2\n"))
    with pytest.raises(UserError, match=r"id '7' is given to two images"):
        index_images(write_list(tmp_path, "ids.csv", "path,id\n0.jpg,7\n1.jpg,7\n"))
