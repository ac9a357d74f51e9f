"""Public retrieval data sets as they are distributed."""

import pytest

from clipfh import UserError
from clipfh.sources.read import read_source


def put(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def rows(listing):
    return [(photo.path, photo.item_id, photo.category, photo.split) for photo in listing.photos]


HEAD = "image_id class_id super_class_id path\n"
PRODUCTS = {
    "Ebay_train.txt": f"{HEAD}1 1 1 bicycle_final/111085122871_0.JPG\n2 1 1 bicycle_final/111085122871_1.JPG\n",
    "Ebay_test.txt": f"{HEAD}3 11319 12 toaster_final/140_0.JPG\n",
    "Ebay_info.txt": HEAD,
    **{f"bicycle_final/111085122871_{view}.JPG": "" for view in (0, 1)},
    "toaster_final/140_0.JPG": "",
}
BIRDS = {
    "images.txt": "1 001.Albatross/a b.jpg\n2 001.Albatross/b.jpg\n3 002.Wren/a.jpg\n",
    "image_class_labels.txt": "1 1\n2 1\n3 2\n",
    "train_test_split.txt": "1 0\n2 1\n3 1\n",
    **{f"images/{path}": "" for path in ("001.Albatross/a b.jpg", "001.Albatross/b.jpg", "002.Wren/a.jpg")},
}


@pytest.mark.parametrize("folder", ["", "Stanford_Online_Products"])
def test_stanford_online_products_are_read_by_their_lists(tmp_path, folder):
    put(tmp_path / folder, PRODUCTS)
    assert rows(read_source(tmp_path)) == [
        ("bicycle_final/111085122871_0.JPG", "1", "bicycle", "train"),
        ("bicycle_final/111085122871_1.JPG", "1", "bicycle", "train"),
        ("toaster_final/140_0.JPG", "11319", "toaster", "test"),
    ]


@pytest.mark.parametrize("folder", ["", "CUB_200_2011"])
def test_half_of_the_birds_are_train(tmp_path, folder):
    put(tmp_path / folder, BIRDS)
    assert rows(read_source(tmp_path)) == [
        ("images/001.Albatross/a b.jpg", "001.Albatross", "", "train"),
        ("images/001.Albatross/b.jpg", "001.Albatross", "", "train"),
        ("images/002.Wren/a.jpg", "002.Wren", "", "test"),
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (PRODUCTS | {"Ebay_test.txt": f"{HEAD}3 11319 toaster"}, "Ebay_test.txt line 2: '3 11319 toaster' is not"),
        (BIRDS | {"image_class_labels.txt": "1 1\n2 1\n"}, "images.txt line 3: image 3 has no class in image_class"),
    ],
)  # fmt: skip
def test_a_list_that_is_cut_is_told(tmp_path, files, said):
    with pytest.raises(UserError, match=said):
        read_source(put(tmp_path, files))
