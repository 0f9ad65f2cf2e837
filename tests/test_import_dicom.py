"""prepare.py import: DICOM series become volumes, single DICOM images become PNG files."""

import datetime
import itertools
import json
import sys

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from conftest import command, contents
from PIL import Image
from pydicom import pixels, uid
from pydicom.dataset import Dataset, FileMetaDataset
from test_import_volumes import entries, refused, voxels

import prepare
from imaging import nifti

LIVER = ("--classes", "liver")
CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
X_RAY = "1.2.840.10008.5.1.4.1.1.1.1"
ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


@pytest.fixture
def imported(monkeypatch, capsys, tmp_path):
    """Import tmp_path/source to tmp_path/mine. Return the status, the output, the errors."""

    def run(*options):
        arguments = ["import", tmp_path / "source", "--out", tmp_path / "mine", *options]
        return command(monkeypatch, capsys, prepare, *arguments)

    return run


def header(modality, sop_class, patient, series):
    """The part of a header that all kinds of images have, with a patient's name."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = sop_class
    data.SOPClassUID = sop_class
    data.SOPInstanceUID = uid.generate_uid()
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.PatientName = "Doe^Jane"
    data.PatientID = patient
    data.PatientBirthDate = "19560102"
    data.PatientSex = "F"
    data.StudyDate = datetime.date(2020, 3, 4)
    data.StudyTime = "101112.5"
    data.StudyInstanceUID = uid.generate_uid(entropy_srcs=[patient])
    data.SeriesInstanceUID = uid.generate_uid(entropy_srcs=[patient, str(series)])
    data.SeriesNumber = series
    data.Modality = modality
    data.Manufacturer = "Maker"
    data.InstitutionName = "Hospital"
    return data


def put_pixels(data, array, photometric="MONOCHROME2"):
    """Store an array (H,W) or (H,W,3), int16, uint16 or uint8."""
    pixels.set_pixel_data(data, array, photometric, 8 * array.dtype.itemsize)
    return data


def save(data, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def oblique(*angles):
    """Direction of columns, rows and slices, (3,3), in LPS."""
    return nibabel.eulerangles.euler2mat(*angles)


def scan(k=0, size=(18, 14, 8)):
    """CT of a body in air, int16 (X,Y,Z) in HU, and a label map."""
    rng = np.random.default_rng(k)
    image = np.full(size, -1000, np.int16)
    image[3:15, 3:11, :] = rng.integers(-50, 90, (12, 8, size[2]))
    labels = np.zeros(size, np.uint8)
    labels[5 : 10 + k, 5:9, 2:6] = 1
    return image, labels


DIRECTION = oblique(0.2, -0.15, 0.1)
ORIGIN = np.array([-40.5, -61.25, 88.0])
SPACING = (0.8, 1.1, 2.5)  # mm, along a row, along a column, between slices


def slices_of(array, patient="ID-7", series=3, direction=DIRECTION, modality="CT"):
    """The datasets of a series with the voxels (X,Y,Z), sorted from the first slice."""
    datasets = []
    for z in range(array.shape[2]):
        data = header(modality, CT if modality == "CT" else MR, patient, series)
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.InstanceNumber = array.shape[2] - z
        data.FrameOfReferenceUID = "1.2.3.4"
        data.ImageOrientationPatient = direction.T[:2].ravel().round(9).tolist()
        position = ORIGIN + direction[:, 2] * SPACING[2] * z
        data.ImagePositionPatient = position.round(7).tolist()
        data.PixelSpacing = [SPACING[1], SPACING[0]]
        data.SliceThickness = 5
        data.WindowCenter = [40, 500]
        data.WindowWidth = [400, 1500]
        if modality == "CT":
            data.RescaleSlope = 2
            data.RescaleIntercept = -1024
            stored = ((array[:, :, z].astype(np.int32) + 1024) // 2).astype(np.uint16)
        else:
            stored = array[:, :, z].astype(np.int16)
        datasets.append(put_pixels(data, np.ascontiguousarray(stored.T)))
    return datasets


def affine_of(direction=DIRECTION):
    """The affine of these slices in RAS."""
    affine = np.eye(4)
    affine[:3, :3] = direction * SPACING
    affine[:3, 3] = ORIGIN
    return np.diag([-1, -1, 1, 1]) @ affine


def write_series(folder, array, shuffle=True, ending=".dcm", **fields):
    """Write a series in files of random names."""
    datasets = slices_of(array, **fields)
    names = np.random.default_rng(1).permutation(len(datasets)) if shuffle else range(len(datasets))
    for data, name in zip(datasets, names, strict=True):
        save(data, folder / f"IM{name:04}{ending}")
    return datasets


def patients(root, n=3):
    """Patients with a series of CT and a label map each."""
    for k in range(n):
        image, labels = scan(k)
        write_series(root / f"images/P{k}", image, patient=f"ID-{9 - k}")
        (root / "labels").mkdir(exist_ok=True)
        label = nibabel.Nifti1Image(labels, affine_of())
        if k == 1:  # stored in another direction, as by dcm2niix
            label = label.as_reoriented([[0, 1], [1, -1], [2, 1]])
        nibabel.save(label, root / f"labels/P{k}.nii.gz")
    return root


def even(array):
    """Values as the 2 of the rescale slope leaves them."""
    return (array.astype(np.int32) + 1024) // 2 * 2 - 1024


# --- series ---------------------------------------------------------------------------------------


def test_series_become_volumes_that_check_accepts(
    imported,
    tmp_path,
    monkeypatch,
    capsys,
):
    source = patients(tmp_path / "source")
    before = contents(source)
    status, text, error = imported(*LIVER)
    assert status == 0, error
    assert "3 volumes with label maps, DICOM files: 24 CT" in text and "patients: 3" in text
    assert contents(source) == before
    for k in range(3):
        _, image, label = entries(tmp_path / "mine")[f"P{k}"]
        np.testing.assert_array_equal(voxels(image), even(scan(k)[0]))
        assert voxels(image).dtype == np.int16
        np.testing.assert_allclose(nibabel.load(image).affine, affine_of(), atol=1e-4)
        assert label.read_bytes() == (source / f"labels/P{k}.nii.gz").read_bytes()
    about = json.loads((tmp_path / "mine/dataset.json").read_text())
    assert about["modality"] == {"0": "CT"}
    status, text, _ = command(monkeypatch, capsys, prepare, "check", tmp_path / "mine")
    assert status == 0, text

    assert imported(*LIVER, "--out", tmp_path / "again")[0] == 0
    for name, content in contents(tmp_path / "again").items():
        if name != "dataset.json":  # it has the name of the folder
            assert content == (tmp_path / "mine" / name).read_bytes()
    everything = b"".join(contents(tmp_path / "mine").values())
    for word in (b"Doe", b"Jane", b"ID-7", b"19560102", b"Hospital"):
        assert word not in everything


DIRECTIONS = {
    "head first": np.eye(3),
    "feet first": np.diag([-1.0, 1, -1]),
    "prone": np.diag([-1.0, -1, 1]),
    "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]).T @ np.diag([1, 1, 1.0]),
    "oblique": DIRECTION,
    "oblique coronal": oblique(0.1, 0.2, -0.3) @ np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_voxels_lie_where_simpleitk_puts_them(imported, tmp_path, name):
    direction = DIRECTIONS[name]
    if np.linalg.det(direction) < 0:
        direction = direction * (1, 1, -1)
    image, _ = scan()
    write_series(tmp_path / "source", image, direction=direction)
    status, text, error = imported()
    assert status == 0, error

    reader = SimpleITK.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(tmp_path / "source"))
    reader.SetFileNames(names)
    expected = reader.Execute()
    (path,) = (tmp_path / "mine/imagesTs").iterdir()
    assert path.name == "source.nii.gz"
    grid = nifti.read_grid(path)
    assert grid.shape == expected.GetSize()
    array = SimpleITK.GetArrayFromImage(expected)
    np.testing.assert_array_equal(voxels(path), array.transpose(2, 1, 0))
    for corner in itertools.product(*((0, side - 1) for side in grid.shape)):
        x, y, z = expected.TransformIndexToPhysicalPoint(corner)
        np.testing.assert_allclose((grid.affine @ (*corner, 1))[:3], (-x, -y, z), atol=1e-3)
    written = SimpleITK.ReadImage(str(path))
    np.testing.assert_allclose(written.GetOrigin(), expected.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(written.GetSpacing(), expected.GetSpacing(), atol=1e-4)
    np.testing.assert_allclose(written.GetDirection(), expected.GetDirection(), atol=1e-4)


def test_files_without_an_ending_and_label_maps_beside_them(imported, tmp_path):
    for k in range(3):
        image, labels = scan(k)
        write_series(tmp_path / f"source/P{k}/dicom", image, ending="", patient=f"{k}")
        drawn = SimpleITK.GetImageFromArray(labels.transpose(2, 1, 0))
        drawn.SetDirection(DIRECTION.ravel().tolist())
        drawn.SetOrigin(ORIGIN.tolist())
        drawn.SetSpacing(SPACING)
        drawn = drawn[3:, 2:, 1:]
        drawn.SetMetaData("Segment0_Name", "liver")
        drawn.SetMetaData("Segment0_LabelValue", "1")
        path = tmp_path / f"source/P{k}/Segmentation.seg.nrrd"
        SimpleITK.WriteImage(drawn, str(path))
    status, _, error = imported()
    assert status == 0, error
    for k in range(3):
        _, _, label = entries(tmp_path / "mine")[f"P{k}"]
        np.testing.assert_array_equal(voxels(label), scan(k)[1])


@pytest.mark.parametrize("name", ["ID-1", "1.2.826.0.1.3680043.8.498.1"])
def test_label_maps_may_be_named_by_patient_or_series(imported, tmp_path, name):
    image, labels = scan()
    datasets = slices_of(image, patient="ID-1")
    for k, data in enumerate(datasets):
        data.SeriesInstanceUID = "1.2.826.0.1.3680043.8.498.1"
        save(data, tmp_path / f"source/scans/2020-03-04/{k}.dcm")
    (tmp_path / "source/labels").mkdir()
    label = nibabel.Nifti1Image(labels, affine_of())
    nibabel.save(label, tmp_path / f"source/labels/{name}.nii.gz")
    status, _, error = imported(*LIVER)
    assert status == 0, error
    assert list(entries(tmp_path / "mine")) == ["2020-03-04"]


def test_mr_without_rescaling_and_of_several_patients(imported, tmp_path):
    for k in range(2):
        image = np.abs(scan(k)[0])
        write_series(tmp_path / f"source/P{k}", image, modality="MR", patient="x", series=k)
    status, text, error = imported()
    assert status == 0, error
    assert "2 volumes without label maps, DICOM files: 16 MR" in text and "patients: 1" in text
    np.testing.assert_array_equal(voxels(tmp_path / "mine/imagesTs/P1.nii.gz"), np.abs(scan(1)[0]))


def test_slopes_of_single_slices_are_applied(imported, tmp_path):
    image = np.abs(scan()[0])
    for z, data in enumerate(slices_of(image, modality="MR")):
        data.Modality = "PT"
        data.RescaleSlope = 0.5 + 0.25 * z
        data.RescaleIntercept = 0
        save(data, tmp_path / f"source/{z}.dcm")
    assert imported()[0] == 0
    expected = image * (0.5 + 0.25 * np.arange(8))
    written = voxels(tmp_path / "mine/imagesTs/source.nii.gz")
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, expected, rtol=1e-6)


def enhanced(array, patient="ID-7"):
    """An enhanced MR: one file with a frame for each slice, in the reverse order."""
    data = header("MR", ENHANCED_MR, patient, 1)
    data.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    shared = Dataset()
    plane = Dataset()
    plane.ImageOrientationPatient = DIRECTION.T[:2].ravel().round(9).tolist()
    shared.PlaneOrientationSequence = [plane]
    measures = Dataset()
    measures.PixelSpacing = [SPACING[1], SPACING[0]]
    measures.SliceThickness = SPACING[2]
    shared.PixelMeasuresSequence = [measures]
    transform = Dataset()
    transform.RescaleSlope = 3
    transform.RescaleIntercept = 7
    shared.PixelValueTransformationSequence = [transform]
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for z in reversed(range(array.shape[2])):
        position = Dataset()
        position.ImagePositionPatient = (ORIGIN + DIRECTION[:, 2] * SPACING[2] * z).tolist()
        frame = Dataset()
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = frames
    return put_pixels(data, np.ascontiguousarray(array[:, :, ::-1].transpose(2, 1, 0)))


def test_enhanced_files_hold_a_whole_volume(imported, tmp_path):
    image = np.abs(scan()[0])
    save(enhanced(image), tmp_path / "source/P1/enhanced.dcm")
    status, _, error = imported()
    assert status == 0, error
    path = tmp_path / "mine/imagesTs/P1.nii.gz"
    np.testing.assert_array_equal(voxels(path), 3 * image + 7)
    np.testing.assert_allclose(nibabel.load(path).affine, affine_of(), atol=1e-4)


def test_localizers_and_reports_are_left_out(imported, tmp_path):
    patients(tmp_path / "source")
    for data in slices_of(scan()[0], series=1)[:2]:
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        save(data, tmp_path / f"source/images/P0/{data.SOPInstanceUID}")
    report = header("SR", "1.2.840.10008.5.1.4.1.1.88.11", "ID-9", 99)
    save(report, tmp_path / "source/images/P0/report.dcm")
    dose = put_pixels(
        header("CT", "1.2.840.10008.5.1.4.1.1.7", "ID-9", 5), np.zeros((9, 9), np.uint8)
    )
    save(dose, tmp_path / "source/images/P0/dose.dcm")
    save(report, tmp_path / "source/DICOMDIR")
    status, text, error = imported(*LIVER)
    assert status == 0, error
    assert "24 CT" not in text and "27 CT, 1 SR" in text
    assert "localizers or without a label map: 1" in text
    assert sorted(entries(tmp_path / "mine")) == ["P0_3", "P1", "P2"]


def test_localizers_alone_are_refused(imported, tmp_path):
    for z, data in enumerate(slices_of(scan()[0])[:2]):
        save(data, tmp_path / f"source/{z}.dcm")
    refused(imported(), tmp_path, "fewer than 3 slices", "masks as PNG")


# --- faulty series --------------------------------------------------------------------------------


def test_a_missing_slice_is_refused_with_the_numbers(imported, tmp_path):
    for z, data in enumerate(slices_of(scan()[0])):
        if z not in (3, 4):
            save(data, tmp_path / f"source/{z}.dcm")
    refused(
        imported(),
        tmp_path,
        "2 slices are missing between 2.dcm and 5.dcm: they are 7.50 mm apart, the others 2.50 mm",
    )


def test_uneven_and_repeated_slices_are_refused(imported, tmp_path):
    datasets = slices_of(scan()[0])
    for z, data in enumerate(datasets):
        save(data, tmp_path / f"source/{z}.dcm")
    save(datasets[2], tmp_path / "source/again.dcm")
    refused(imported(), tmp_path, "2.dcm", "again.dcm", "same position", "0 more")
    (tmp_path / "source/again.dcm").unlink()

    moved = np.array(datasets[4].ImagePositionPatient) + DIRECTION[:, 2] * 0.8
    datasets[4].ImagePositionPatient = moved.tolist()
    save(datasets[4], tmp_path / "source/4.dcm")
    refused(imported(), tmp_path, "1.70 to 3.30 mm apart", "between 3.dcm and 4.dcm")


def test_a_tilted_gantry_is_refused(imported, tmp_path):
    for z, data in enumerate(slices_of(scan()[0])):
        tilted = np.array(data.ImagePositionPatient) + DIRECTION[:, 1] * 0.5 * z
        data.ImagePositionPatient = tilted.tolist()
        save(data, tmp_path / f"source/{z}.dcm")
    refused(imported(), tmp_path, "tilted by 11.3 degrees", "dcm2niix")


def test_slices_of_another_size_are_refused(imported, tmp_path):
    write_series(tmp_path / "source", scan()[0])
    odd = slices_of(scan(size=(20, 14, 8))[0])[4]
    save(odd, tmp_path / "source/x.dcm")
    refused(imported(), tmp_path, "another size")


def test_two_series_for_one_label_map_are_refused(imported, tmp_path):
    source = patients(tmp_path / "source")
    for data in slices_of(scan(1)[0], patient="ID-8", series=4):
        save(data, source / f"images/P1/{data.SOPInstanceUID}.dcm")
    refused(imported(*LIVER), tmp_path, "labels/P1.nii.gz: 2 series", "SeriesInstanceUID")
    (source / "labels/P1.nii.gz").rename(source / "labels/P1_4.nii.gz")
    refused(imported(*LIVER), tmp_path, "the series P1_3 has no label map", "--skip-unpaired")
    assert imported(*LIVER, "--skip-unpaired")[0] == 0
    assert sorted(entries(tmp_path / "mine")) == ["P0", "P1_4", "P2"]


def test_a_label_map_on_another_grid_is_refused(imported, tmp_path):
    source = patients(tmp_path / "source")
    moved = affine_of()
    moved[1, 3] += 2
    nibabel.save(nibabel.Nifti1Image(scan(1)[1], moved), source / "labels/P1.nii.gz")
    refused(imported(*LIVER), tmp_path, "label P1.nii.gz: its affine is 2 off")


def test_truncated_files_are_refused(imported, tmp_path):
    source = patients(tmp_path / "source")
    path = source / "images/P1/IM0003.dcm"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(imported(*LIVER), tmp_path, "IM0003.dcm: not readable as DICOM")
    path.write_bytes(whole[:150])
    refused(imported(*LIVER), tmp_path, "IM0003.dcm: not readable as DICOM")
    path.write_bytes(b"")
    refused(imported(*LIVER), tmp_path, "IM0003.dcm: not readable as DICOM")


def test_a_missing_package_is_named(imported, tmp_path, monkeypatch):
    patients(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(imported(*LIVER), tmp_path, ".dcm: DICOM files need pydicom: pip install pydicom")


def test_a_compression_without_its_decoder_is_refused_with_the_packages(
    imported,
    tmp_path,
):
    source = patients(tmp_path / "source")
    path = source / "images/P1/IM0003.dcm"
    data = pydicom.dcmread(path)
    data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = uid.JPEGLosslessSV1
    data.save_as(path)
    refused(imported(*LIVER), tmp_path, "IM0003.dcm", "JPEG Lossless", "pip install pylibjpeg")


# --- segmentations and contours in DICOM ----------------------------------------------------------


def referring(modality, sop_class, image, patient):
    """The header of a file that refers to the series of an image."""
    data = header(modality, sop_class, patient, 77)
    data.StudyInstanceUID = image.StudyInstanceUID
    data.FrameOfReferenceUID = image.FrameOfReferenceUID
    reference = Dataset()
    reference.SeriesInstanceUID = image.SeriesInstanceUID
    if modality == "SEG":
        data.ReferencedSeriesSequence = [reference]
        return data
    study = Dataset()
    study.RTReferencedSeriesSequence = [reference]
    frame = Dataset()
    frame.RTReferencedStudySequence = [study]
    data.ReferencedFrameOfReferenceSequence = [frame]
    return data


def sequence_of(**fields):
    """A sequence of one item."""
    item = Dataset()
    for name, value in fields.items():
        setattr(item, name, value)
    return [item]


def segmentation(image, masks, patient="ID-1"):
    """A SEG file of {name: mask (X,Y,Z)}, without frames of empty slices, from the last slice."""
    data = referring("SEG", "1.2.840.10008.5.1.4.1.1.66.4", image, patient)
    data.SegmentationType = "BINARY"
    shared = Dataset()
    orientation = image.ImageOrientationPatient
    shared.PlaneOrientationSequence = sequence_of(ImageOrientationPatient=orientation)
    shared.PixelMeasuresSequence = sequence_of(PixelSpacing=image.PixelSpacing)
    data.SharedFunctionalGroupsSequence = [shared]

    data.SegmentSequence = []
    data.PerFrameFunctionalGroupsSequence = []
    frames = []
    for number, (name, mask) in enumerate(masks.items(), 1):
        data.SegmentSequence += sequence_of(SegmentNumber=number, SegmentLabel=name)
        for z in reversed(range(mask.shape[2])):
            if not mask[:, :, z].any():
                continue
            frame = Dataset()
            position = ORIGIN + DIRECTION[:, 2] * SPACING[2] * z
            frame.PlanePositionSequence = sequence_of(ImagePositionPatient=position.tolist())
            frame.SegmentIdentificationSequence = sequence_of(ReferencedSegmentNumber=number)
            data.PerFrameFunctionalGroupsSequence.append(frame)
            frames.append(mask[:, :, z].T)
    bits = pixels.pack_bits(np.array(frames, np.uint8).ravel())
    data.Rows, data.Columns = frames[0].shape
    data.NumberOfFrames = len(frames)
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 1
    data.HighBit = data.PixelRepresentation = 0
    data.PixelData = bits
    return data


def test_segmentations_in_dicom_are_read(imported, tmp_path):
    for k in range(3):
        image, labels = scan(k)
        datasets = write_series(tmp_path / f"source/P{k}/CT", image, patient=f"ID-{k}")
        tumour = np.zeros(labels.shape, np.uint8)
        tumour[8:12, 6:8, 3:5] = 1
        masks = {"Tumour": tumour, "Liver": labels}
        drawn = segmentation(datasets[0], masks, f"ID-{k}")
        save(drawn, tmp_path / f"source/P{k}/segmentation.dcm")
    status, text, error = imported("--classes", "Liver,Tumour")
    assert status == 0, error
    assert "3 volumes with label maps" in text and "24 CT, 3 SEG" in text
    assert "P1/segmentation.dcm (12 voxels)" in text and "higher number" in text
    for k in range(3):
        _, _, label = entries(tmp_path / "mine")[f"P{k}"]
        expected = scan(k)[1]
        expected[8:12, 6:8, 3:5] = 2
        np.testing.assert_array_equal(voxels(label), expected)

    assert imported("--out", tmp_path / "all")[0] == 0  # in the order of the file: liver covers
    labels = voxels(entries(tmp_path / "all")["P0"][2])
    assert (labels == 2).sum() == scan()[1].sum()


def test_a_segmentation_of_other_voxels_is_refused(imported, tmp_path):
    image, labels = scan()
    datasets = write_series(tmp_path / "source/CT", image, patient="ID-1")
    drawn = segmentation(datasets[0], {"Liver": labels})
    path = save(drawn, tmp_path / "source/seg.dcm")
    assert imported("--out", tmp_path / "right")[0] == 0
    (item,) = drawn.SharedFunctionalGroupsSequence
    item.PixelMeasuresSequence[0].PixelSpacing = [1.1, 0.81]
    save(drawn, path)
    refused(imported(), tmp_path, "seg.dcm: a frame does not lie on a slice of its series")
    drawn.SegmentationType = "FRACTIONAL"
    save(drawn, path)
    refused(imported(), tmp_path, "type fractional", "3D Slicer")


def contours(image, structures, patient="ID-1"):
    """An RTSTRUCT file of {name: [(slice, corners in voxels (x, y))]}."""
    data = referring("RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3", image, patient)
    data.StructureSetROISequence = []
    data.ROIContourSequence = []
    for number, (name, polygons) in enumerate(structures.items(), 5):
        data.StructureSetROISequence += sequence_of(ROINumber=number, ROIName=name)
        drawn = []
        for z, corners in polygons:
            points = []
            for x, y in corners:
                points += (ORIGIN + DIRECTION @ (np.array([x, y, z]) * SPACING)).round(6).tolist()
            drawn += sequence_of(
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(corners),
                ContourData=points,
            )
        drawn += sequence_of(ContourGeometricType="POINT", ContourData=[0, 0, 0])
        item = sequence_of(ReferencedROINumber=number)[0]
        item.ContourSequence = drawn
        data.ROIContourSequence.append(item)
    return data


def rectangle(x0, y0, x1, y1):
    """Corners around the centres of the voxels x0 to x1 and y0 to y1."""
    return [(x0 - 0.5, y0 - 0.5), (x1 + 0.5, y0 - 0.5), (x1 + 0.5, y1 + 0.5), (x0 - 0.5, y1 + 0.5)]


def test_contours_are_filled(imported, tmp_path):
    image, _ = scan()
    structures = {
        "Ring": [(z, rectangle(4, 3, 12, 10)) for z in (2, 3)]
        + [(z, rectangle(6, 5, 8, 7)) for z in (2, 3)],  # a hole
        "Triangle": [(5, [(2.5, 1.5), (8.5, 1.5), (2.5, 7.5)])],
        "Unused": [],
    }
    for k in range(3):
        datasets = write_series(tmp_path / f"source/P{k}", image, patient=f"ID-{k}")
        drawn = contours(datasets[0], structures, f"ID-{k}")
        save(drawn, tmp_path / f"source/P{k}/rtstruct.dcm")
    status, text, error = imported("--classes", "Ring,Triangle")
    assert status == 0, error
    labels = voxels(entries(tmp_path / "mine")["P1"][2])
    expected = np.zeros(image.shape, np.uint8)
    expected[4:13, 3:11, 2:4] = 1
    expected[6:9, 5:8, 2:4] = 0
    for x, y in itertools.product(range(3, 9), range(2, 8)):
        if (x - 2.5) + (y - 1.5) < 6:  # below the long side
            expected[x, y, 5] = 2
    on_the_side = {(x, y) for x, y in itertools.product(range(18), range(14)) if x + y == 10}
    for x, y in on_the_side:
        expected[x, y, 5] = labels[x, y, 5]  # either is right
    np.testing.assert_array_equal(labels, expected)
    assert (labels == 2).sum() >= 15


@pytest.mark.parametrize("part", ["SegmentSequence", "PerFrameFunctionalGroupsSequence"])
def test_incomplete_segmentations_are_refused(imported, tmp_path, part):
    image, labels = scan()
    datasets = write_series(tmp_path / "source/CT", image, patient="ID-1")
    drawn = segmentation(datasets[0], {"Liver": labels})
    delattr(drawn, part)
    save(drawn, tmp_path / "source/seg.dcm")
    refused(imported(), tmp_path, "seg.dcm: its header is not complete", part)


def test_contours_between_slices_are_refused(imported, tmp_path):
    datasets = write_series(tmp_path / "source", scan()[0], patient="ID-1")
    drawn = contours(datasets[0], {"Heart": [(2.5, rectangle(3, 3, 6, 6))]})
    save(drawn, tmp_path / "source/rtstruct.dcm")
    refused(imported(), tmp_path, "a contour of Heart", "slice 2.50 of 8")


@pytest.mark.parametrize("modality", ["SEG", "RTSTRUCT"])
def test_labels_without_their_series_are_refused(imported, tmp_path, modality):
    other = slices_of(scan()[0], patient="someone else")[0]
    write_series(tmp_path / "source", scan()[0])
    data = referring(modality, "1.2.840.10008.5.1.4.1.1.66.4", other, "someone else")
    save(data, tmp_path / "source/a.dcm")
    refused(imported(), tmp_path, "a.dcm: no series of DICOM files fit")
    for path in (tmp_path / "source").glob("IM*"):
        path.unlink()
    refused(imported(), tmp_path, f"a.dcm: is a {modality} file, but the images", "are missing")


# --- single images --------------------------------------------------------------------------------

SIZE = (30, 40)


def x_ray(patient="ID-1", photometric="MONOCHROME2", **fields):
    """An X-ray of 12 bits whose values rise from 0 to 4095, by columns, and its dataset."""
    ramp = np.linspace(0, 4095, SIZE[1]).round().astype(np.uint16)
    array = np.tile(ramp, (SIZE[0], 1))
    data = header("DX", X_RAY, patient, 1)
    data.ImagerPixelSpacing = [0.2, 0.15]
    for name, value in fields.items():
        setattr(data, name, value)
    pixels.set_pixel_data(data, array, photometric, 12)
    return data, array


def blob(path, top=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(SIZE, np.uint8)
    mask[5:15, 10:25] = top
    Image.fromarray(mask).save(path)


def test_x_rays_with_masks_become_a_data_set(imported, tmp_path, monkeypatch, capsys):
    for k in range(12):
        data, _ = x_ray(f"ID-{k // 2}", WindowCenter=1000 + 50 * k, WindowWidth=2500)
        noise = np.random.default_rng(k).integers(0, 4096, SIZE, np.uint16)
        pixels.set_pixel_data(data, noise, "MONOCHROME2", 12)
        save(data, tmp_path / f"source/images/x{k}.dcm")
        blob(tmp_path / f"source/masks/x{k}.png")
    before = contents(tmp_path / "source")
    status, text, error = imported("--prompt", "a nodule")
    assert status == 0, error
    assert "12 DICOM images, 12 masks (12 DX)" in text and "patients: 6" in text
    assert contents(tmp_path / "source") == before
    lines = (tmp_path / "mine/spacing.csv").read_text().splitlines()
    assert lines[0] == "image,x_mm,y_mm" and "x3.png,0.15,0.2" in lines and len(lines) == 13

    groups = {}
    for path in (tmp_path / "mine/anns").iterdir():
        for entry in json.loads(path.read_text()):
            groups.setdefault(entry["group"], set()).add(path.stem)
            assert entry["prompts"]["p1"] == "a nodule"
    assert sorted(groups) == [f"patient {k}" for k in range(1, 7)]
    assert all(len(splits) == 1 for splits in groups.values())
    mask = np.asarray(Image.open(tmp_path / "mine/masks/x5.png"))
    assert (mask == 255).sum() == 150 and (mask > 0).sum() == 150
    status, text, _ = command(monkeypatch, capsys, prepare, "check", tmp_path / "mine")
    assert status == 0, text
    assert b"Doe" not in b"".join(contents(tmp_path / "mine").values())


WINDOWS = {  # fields of the header
    "linear": {"WindowCenter": 1500, "WindowWidth": 1001},
    "several": {"WindowCenter": [900, 40], "WindowWidth": [700, 2]},
    "exact": {"WindowCenter": 1500, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 1500, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_grey_levels_are_those_of_the_window(
    imported,
    tmp_path,
    name,
    photometric,
):
    data, array = x_ray(photometric=photometric, **WINDOWS[name])
    save(data, tmp_path / "source/x.dcm")
    assert imported()[0] == 0
    written = np.asarray(Image.open(tmp_path / "mine/images/x.png"))
    expected = pixels.apply_voi_lut(array, data) / 4095 * 255  # 12 bits
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(written - expected).max() <= 0.51
    assert np.ptp(written) > 200


def test_grey_levels_without_a_window_go_from_minimum_to_maximum(imported, tmp_path):
    data, array = x_ray(RescaleSlope=0.5, RescaleIntercept=-100)
    save(data, tmp_path / "source/x.dcm")
    assert imported()[0] == 0
    written = np.asarray(Image.open(tmp_path / "mine/images/x.png"))
    assert np.abs(written - array / 4095 * 255).max() <= 0.51


def test_a_table_of_grey_levels_is_applied(imported, tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    values = (65535 * np.sqrt(np.arange(4096) / 4095)).astype(np.uint16)
    table.LUTData = values.tobytes()
    table["LUTData"].VR = "OW"
    data, array = x_ray(VOILUTSequence=[table])
    save(data, tmp_path / "source/x.dcm")
    assert imported()[0] == 0
    written = np.asarray(Image.open(tmp_path / "mine/images/x.png"))
    assert np.abs(written - 255 * np.sqrt(array / 4095)).max() <= 0.51


def test_images_without_masks_are_written_for_prediction(imported, tmp_path):
    for k in range(2):
        save(x_ray()[0], tmp_path / f"source/{k}/x.dcm")
    status, text, error = imported()
    assert status == 0, error
    assert "2 DICOM images, no masks" in text and "--out masks" in text
    names = sorted(path.name for path in (tmp_path / "mine").rglob("*.*"))
    assert names == ["0_x.png", "1_x.png", "README.txt", "overview.png", "spacing.csv"]


def test_colour_ultrasound_becomes_rgb(imported, tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    data = header("US", ULTRASOUND, "ID-1", 1)
    region = Dataset()
    region.PhysicalUnitsXDirection = 3
    region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX = 0.004
    region.PhysicalDeltaY = 0.005
    data.SequenceOfUltrasoundRegions = [region]
    ybr = pixels.convert_color_space(rgb, "RGB", "YBR_FULL")
    save(put_pixels(data, ybr, "YBR_FULL"), tmp_path / "source/ybr.dcm")
    save(put_pixels(data, rgb, "RGB"), tmp_path / "source/rgb.dcm")
    assert imported()[0] == 0
    assert (np.asarray(Image.open(tmp_path / "mine/images/rgb.png")) == rgb).all()
    back = np.asarray(Image.open(tmp_path / "mine/images/ybr.png")).astype(int)
    assert np.abs(back - rgb).max() <= 2  # rounding of YBR
    assert "rgb.png,0.04,0.05" in (tmp_path / "mine/spacing.csv").read_text()


def test_slices_with_masks_of_the_same_name_are_images(imported, tmp_path):
    for z, data in enumerate(slices_of(scan(size=(40, 30, 8))[0])):
        save(data, tmp_path / f"source/slice{z}.dcm")
        blob(tmp_path / f"source/slice{z}_mask.png", 1 + z % 2)
    status, _, error = imported()
    assert status == 2 and "--format dicom" in error and "--format dicom-images" in error
    result = imported("--format", "dicom-images", "--classes", "liver,spleen")
    assert result[0] == 0, result[2]
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert classes == {"0": "background", "1": "liver", "2": "spleen"}
    image = np.asarray(Image.open(tmp_path / "mine/images/slice4.png"))
    hu = even(scan(size=(40, 30, 8))[0])[:, :, 4].T
    expected = ((hu - 39.5) / 399 + 0.5).clip(0, 1) * 255  # the header's first window, 40 and 400
    assert np.abs(image - expected).max() <= 0.51
    mask = np.asarray(Image.open(tmp_path / "mine/masks/slice5.png"))
    assert set(np.unique(mask)) == {0, 2}


def test_masks_that_do_not_fit_are_refused(imported, tmp_path):
    for k in range(3):
        save(x_ray()[0], tmp_path / f"source/images/x{k}.dcm")
        blob(tmp_path / f"source/masks/x{k}.png")
    blob(tmp_path / "source/masks/x9.png")
    refused(imported(), tmp_path, "x9.png: has no DICOM image", "--skip-unpaired")
    (tmp_path / "source/masks/x9.png").unlink()
    (tmp_path / "source/masks/x1.png").unlink()
    refused(imported(), tmp_path, "x1.dcm: has no mask")
    Image.new("L", (10, 10)).save(tmp_path / "source/masks/x1.png")
    refused(imported(), tmp_path, "x1.dcm: 40x30, but its mask is 10x10")


def test_films_are_refused(imported, tmp_path):
    data = header("US", ULTRASOUND, "ID-1", 1)
    frames = np.zeros((5, *SIZE), np.uint8)
    save(put_pixels(data, frames), tmp_path / "source/film.dcm")
    refused(imported(), tmp_path, "film.dcm: is a film of 5 frames")
